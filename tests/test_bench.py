"""The benchmarks' own promises, on models of a few hundred kilobytes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from streammerge import api
from streammerge.checkpoint import load_checkpoint
from streammerge.recipe import Recipe

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Import a script of bench/ the way it imports its neighbours."""
    monkeypatch.syspath_prepend(BENCH)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def contents(model: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def test_a_generated_set_is_sharded_indexed_and_opens_in_transformers(bench, tmp_path):
    generate = bench("generate")
    base, *_ = generate.ensure(tmp_path / "set", generate.Settings(size="tiny", shards=3), experts=1)
    assert len(list(base.glob("model-*-of-00003.safetensors"))) == 3
    index = json.loads((base / "model.safetensors.index.json").read_text())
    tensors = contents(base)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values())
    transformers = pytest.importorskip("transformers")
    _, info = transformers.AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert transformers.AutoTokenizer.from_pretrained(base)("a 1").input_ids == [13, 4]


def test_an_expert_does_not_depend_on_how_many_there_are(bench, tmp_path):
    generate = bench("generate")
    settings = generate.Settings(size="tiny", kind="mixed")
    few = generate.ensure(tmp_path / "few", settings, experts=1)
    many = generate.ensure(tmp_path / "many", settings, experts=3)
    for one, other in zip(few, many, strict=False):
        left, right = contents(one), contents(other)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_changes_have_the_size_of_their_kind(bench, tmp_path):
    generate = bench("generate")
    settings = generate.Settings(size="tiny", kind="mixed")
    base, sft, rl = (contents(m) for m in generate.ensure(tmp_path / "set", settings, experts=2))
    name = "lm_head.weight"
    dense, sparse = sft[name].float() - base[name].float(), rl[name].float() - base[name].float()
    assert float(base[name].float().std()) == pytest.approx(0.02, rel=0.05)
    assert float(dense.std()) == pytest.approx(0.0005, rel=0.1)
    assert float((sparse == 0).float().mean()) > 0.5


def test_a_complete_set_is_kept_and_a_broken_one_made_again(bench, tmp_path):
    generate = bench("generate")
    settings = generate.Settings(size="tiny")
    base, *_ = generate.ensure(tmp_path / "set", settings, experts=2)
    written = base.stat().st_mtime_ns
    generate.ensure(tmp_path / "set", settings, experts=1)
    assert base.stat().st_mtime_ns == written
    marker = tmp_path / "set" / "set.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"complete": False}))
    generate.ensure(tmp_path / "set", settings, experts=2)
    assert base.stat().st_mtime_ns != written


def test_a_folder_of_something_else_is_left_alone(bench, tmp_path):
    generate = bench("generate")
    (tmp_path / "precious.txt").write_text("kept")
    with pytest.raises(SystemExit, match="something else"):
        generate.ensure(tmp_path, generate.Settings(size="tiny"), experts=1)
    assert (tmp_path / "precious.txt").read_text() == "kept"


def test_trimming_leaves_a_smaller_complete_set(bench, tmp_path):
    generate = bench("generate")
    settings = generate.Settings(size="tiny")
    base, *_ = generate.ensure(tmp_path / "set", settings, experts=3)
    written = base.stat().st_mtime_ns
    generate.trim(tmp_path / "set", experts=1)
    assert [p.name for p in sorted((tmp_path / "set").glob("expert-*"))] == ["expert-1"]
    generate.ensure(tmp_path / "set", settings, experts=1)
    assert base.stat().st_mtime_ns == written
    generate.trim(tmp_path / "set", experts=0)
    assert not (tmp_path / "set").exists()


def test_a_cold_file_has_no_pages_and_a_warm_one_has_all(bench, tmp_path):
    files = bench("files")
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    files.make_warm([file])
    assert files.cached_bytes(file) == 1 << 20


def test_a_child_is_measured_and_its_failure_reported(bench):
    child = bench("child")
    ran = child.run(
        [sys.executable, "-c", "x = bytearray(b'1') * (1 << 26); import time; time.sleep(0.3); print('{}')"]
    )
    assert ran.peak_anonymous_bytes > 1 << 26
    assert ran.json() == {}
    with pytest.raises(SystemExit, match="ended with 3"):
        child.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_child_stands_still_in_its_pauses_and_they_are_not_its_time(bench, tmp_path, monkeypatch):
    child, ticks, seen = bench("child"), tmp_path / "ticks", []
    monkeypatch.setattr(child, "PAUSE_EVERY_SECONDS", 0.3)

    def look_twice() -> None:
        sizes = []
        for _ in range(2):
            time.sleep(0.1)
            sizes.append(ticks.stat().st_size)
        seen.append(sizes[1] - sizes[0])

    script = "import sys, time\nfor _ in range(400):\n print(file=open(sys.argv[1], 'a')); time.sleep(0.002)"
    began = time.perf_counter()
    ran = child.run([sys.executable, "-c", script, str(ticks)], in_pauses=look_twice)
    assert ticks.stat().st_size == 400
    assert seen
    assert set(seen) == {0}
    assert ran.paused_seconds >= 0.2 * len(seen)
    assert ran.elapsed_seconds + ran.paused_seconds <= time.perf_counter() - began


def test_rows_name_the_machine_the_versions_the_date_and_the_commit(bench, tmp_path):
    rows = bench("rows")
    rows.append(tmp_path, "speed", {"seconds": 1.0})
    rows.append(tmp_path, "speed", {"seconds": 2.0})
    first, second = (json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines())
    assert first.keys() == {"benchmark", "date", "commit", "machine", "versions", "load", "seconds"}
    assert first["machine"].keys() == {"cpu", "cores", "memory_bytes"}
    assert second["seconds"] == 2.0


def test_the_float64_formulas_agree_where_they_must(bench):
    truth = bench("truth")
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(24, 16, generator=draw).bfloat16()
    experts = [(base + 0.1 * torch.randn(24, 16, generator=draw)).bfloat16() for _ in range(3)]
    deltas = truth.deltas64(base, experts)
    gram, right = truth.system64(deltas)
    exact = right @ torch.linalg.pinv(gram)
    assert truth.relative_error(truth.exact64(deltas), exact) < 1e-12
    assert truth.relative_error(truth.cut64(deltas), exact) < 1e-12
    assert truth.relative_error(truth.ridge64(deltas, 1e-12), exact) < 1e-9
    assert truth.relative_error(truth.paper32(base, experts), exact) < 1e-5
    # one expert comes back whole, however large the ridge
    assert truth.relative_error(truth.ridge64(deltas[:1], 10.0), deltas[0]) < 1e-12


def test_the_exact_formula_takes_the_dual_side_of_a_wide_matrix(bench):
    truth = bench("truth")
    draw = torch.Generator().manual_seed(0)
    deltas = [torch.randn(4, 32, generator=draw, dtype=torch.float64) for _ in range(3)]
    gram, right = truth.system64(deltas)
    assert truth.relative_error(truth.exact64(deltas), right @ torch.linalg.pinv(gram)) < 1e-12


def test_bf16_neighbours_are_one_step_apart_across_zero(bench):
    linear_io = bench("linear_io")
    words = torch.tensor([-1, 0, 1], dtype=torch.int16)
    tiny = torch.tensor([0x8001 - 0x10000, 0, 1], dtype=torch.int16).view(torch.bfloat16)
    assert torch.equal(linear_io._ordered(tiny), words.to(torch.int32))


SCRIPTS = (
    "generate", "memory", "correctness", "speed", "linear_io", "peers", "seven", "growth", "on_paper", "readers",
    "checks", "moe", "batch", "run_all", "gpu",
)  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_listed_in_the_readme(script):
    assert f"`{script}.py`" in (BENCH / "README.md").read_text()
    assert (BENCH / f"{script}.py").is_file()


def test_the_imports_that_memory_subtracts_exist(bench):
    assert all(importlib.util.find_spec(module) for module in bench("memory").IMPORTS)


def test_the_recipes_are_ones_that_streammerge_reads(bench, tmp_path):
    models = [tmp_path / "one", tmp_path / "two"]
    path = bench("child").write_recipe(
        tmp_path / "r.yaml", "actmat", models, tmp_path / "base", {"solver": "exact"}, out_dtype="float32"
    )
    recipe = Recipe.load(path)
    assert (recipe.method, recipe.output_dtype, len(recipe.experts)) == ("actmat", "F32", 2)
    assert recipe.warnings == ()


def test_the_checks_that_are_timed_are_those_of_a_merge_and_change_no_weight(bench, tmp_path):
    base, *experts = bench("generate").ensure(tmp_path / "set", bench("generate").Settings(size="tiny"), experts=2)
    recipe = bench("child").write_recipe(tmp_path / "r.yaml", "actmat", experts, base)
    checks, reports, weights = bench("checks"), {}, {}
    for way, without in {"with": (), "without": tuple(bench("unchecked").CHECKS)}.items():
        taken = checks.merge(without, recipe, tmp_path / way)
        assert 0 < taken["seconds"] < taken["command_seconds"]
        reports[way] = json.loads((tmp_path / way / "streammerge.json").read_text())["tensors"]
        weights[way] = checks.digests(tmp_path / way)
    assert weights["with"] == weights["without"]
    for before, after in zip(reports["with"], reports["without"], strict=True):
        assert before["sha256"] != after["sha256"] == "0" * 64
        assert (after["growth"], after["norm_ratio"], after["changed"], after["rounding_loss"]) == (None, None, 0, 0)
        if before["method"] == "actmat":
            assert min(before["growth"], before["norm_ratio"], before["changed"], before["rounding_loss"]) > 0
    certain = {way: max(t["facts"].get("certificate", 0.0) for t in tensors) for way, tensors in reports.items()}
    assert certain["with"] > certain["without"] == 0.0


def test_without_its_checks_a_merge_sees_no_nan(bench, tmp_path):
    base, expert, *_ = bench("generate").ensure(tmp_path / "set", bench("generate").Settings(size="tiny"), experts=1)
    file = bench("files").tensor_places(expert)["lm_head.weight"]
    with file.open("r+b") as opened:
        opened.seek(-2, 2)
        opened.write(b"\xff\xff")
    recipe = bench("child").write_recipe(tmp_path / "r.yaml", "linear", [base, expert])
    with pytest.raises(SystemExit, match="holds NaN"):
        bench("checks").merge((), recipe, tmp_path / "with")
    for without, told in {"inputs": "leaves the range", "outputs": "holds NaN"}.items():
        with pytest.raises(SystemExit, match=told):
            bench("checks").merge((without,), recipe, tmp_path / without)
    bench("checks").merge(("inputs", "outputs"), recipe, tmp_path / "neither")


def test_a_mixtures_plan_and_its_many_small_merges_are_timed(bench, tmp_path):
    script = str(BENCH / "moe.py")
    options = ["--size", "tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    ran = bench("child").run([sys.executable, script, *options])
    assert "linear" in ran.stdout
    assert "actmat" in ran.stdout
    plan, *merges = (json.loads(line) for line in (tmp_path / "moe.jsonl").read_text().splitlines())
    assert (plan["steps"], plan["torch"]) == (69, False)
    assert [(row["method"], row["matrices"]) for row in merges] == [("linear", 48), ("actmat", 48)]
    for row in merges:
        assert row["small_cpu_seconds"] == pytest.approx(row["beside_cpu_seconds"] + row["arithmetic_cpu_seconds"])
        assert row["share"] == row["beside_cpu_seconds"] / row["large_cpu_seconds"]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_merge_that_gave_something_else_is_not_timed(bench, tmp_path):
    moe = bench("moe")
    shape = moe.Shape(layers=1, experts=2, hidden=8, wide=8, body=False)
    folders = moe.filled(tmp_path / "models", shape)
    assert moe.merged(folders, "linear", tmp_path / "out", 6).seconds > 0.0
    assert moe.arithmetic(folders, "linear", tmp_path / "out").seconds > 0.0
    with pytest.raises(SystemExit, match="off the method by itself; nothing is timed"):
        moe.arithmetic(folders, "task_arithmetic", tmp_path / "out")


def test_hollow_models_have_the_tensors_of_their_shape_and_take_no_disk(bench, tmp_path):
    moe = bench("moe")
    shape = moe.Shape(layers=2, experts=4, stacked=True)
    base, *_ = moe.hollow(tmp_path / "models", shape)
    found = api.inspect(base).models[0]
    assert {name: entry.shape for name, entry in found.tensors.items()} == dict(shape.tensors())
    assert sum(file.stat().st_blocks * 512 for file in base.iterdir()) < 1 << 20 < found.tensor_bytes


def ran(bench, script: str, tmp_path: Path, *options: str) -> list[dict]:
    """The rows of a script's run at its smallest."""
    words = ["--size", "tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), *options]
    bench("child").run([sys.executable, str(BENCH / f"{script}.py"), *words])
    return [json.loads(line) for line in (tmp_path / "results" / f"{script}.jsonl").read_text().splitlines()]


def test_olmo_3_has_its_names_shapes_and_files(bench):
    shape = bench("olmo3").SIZES["7b"]
    sizes = shape.nbytes()
    assert (len(sizes), sum(sizes.values()) // 2) == (355, 7_298_011_136)
    assert [round(sum(sizes[name] for name in group) / 1e9, 2) for group in shape.shards(0)] == [4.97, 4.98, 4.64]
    config = shape.config()
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.Olmo3ForCausalLM(transformers.Olmo3Config(**config))
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shape.tensors()


def test_of_olmo_3_four_layers_lie_in_the_files_and_the_others_are_read_from_them(bench, tmp_path, monkeypatch):
    olmo3, generate, repeated = bench("olmo3"), bench("generate"), bench("repeated")
    settings = olmo3.Olmo3Settings(size="tiny", distinct_layers=2)
    base, *_ = generate.ensure(tmp_path / "set", settings, experts=1)
    stored = {name for name in settings.shape().tensors() if settings.shape().twin(name) == name}
    assert {name.split(".")[2] for name in stored if "layers" in name} == {"0", "1"}
    assert "lm_head.weight" not in stored
    storage = repeated.RepeatedStorage(2)
    entries = load_checkpoint(storage, str(base)).tensors

    def read(name: str) -> bytes:
        entry, buffer = entries[name], bytearray(entries[name].nbytes)
        file = storage.open(str(base), entry.file)
        half = entry.nbytes // 2
        for start, end in ((0, half), (half, entry.nbytes)):
            file.fetch(entry.offset + start, end - start, memoryview(buffer)[start:end])
            file.release(entry.offset + start, end - start)
        file.close()
        return bytes(buffer)

    on_disk = contents(base)
    for name in entries:
        twin = settings.shape().twin(name)
        assert read(name) == on_disk[twin].view(torch.uint8).numpy().tobytes()
        assert bool(on_disk[name].any()) == (name in stored)


@pytest.mark.long
def test_a_7b_merge_is_held_against_the_product_rate_and_its_plan(bench, tmp_path):
    (row,) = ran(bench, "seven", tmp_path)
    assert (row["layers"], row["distinct_layers"], row["files"]) == (4, 2, 3)
    assert row["matrix_share_of_product_rate"] == row["matrix_flops_per_second"] / row["product_flops_per_second"] > 0
    assert row["seconds_of_shape"]["64x64"]["tensors"] == 16
    assert 0.0 <= row["waiting_share"] < 1.0
    assert row["relative_error"] < 0.01
    assert 0 < row["anonymous_above_imports_bytes"] < row["budget_bytes"]


def test_twins_that_came_out_different_are_not_recorded(bench, tmp_path):
    seven, shape = bench("seven"), bench("olmo3").SIZES["tiny"]
    tensors = [{"name": name, "sha256": name} for name in shape.tensors()]
    with pytest.raises(SystemExit, match="nothing is recorded"):
        seven.refuse_wrong(shape, [], tmp_path, {"tensors": tensors})


@pytest.mark.long
def test_growth_along_an_axis_is_measured_and_fitted(bench, tmp_path):
    found = ran(bench, "growth", tmp_path, "--axis", "width", "--method", "linear")
    *measured, fitted = found
    # the start first: of its rates are the others' predictions
    assert [row["width"] for row in measured] == [128, 64, 256]
    assert fitted["fitted"].keys() == {"seconds", "CPU seconds", "memory"}
    assert list((tmp_path / "work").glob("growth*")) == [tmp_path / "work" / "growth.yaml"]


def test_the_fitted_exponent_is_the_curves_own(bench):
    growth = bench("growth")
    assert growth.exponent([(x, 7.0 * x**2.5) for x in (1.0, 2.0, 5.0)]) == pytest.approx(2.5)
    start = growth.START["1.1b"]
    assert [point.experts for point in growth.points("experts", start)] == [2, 3, 5, 8]
    deeper, wider = growth.points("parameters", start)[2], growth.points("width", start)[2]
    assert (deeper.depth, deeper.width, wider.depth) == (8, 4096, 4)


@pytest.mark.long
def test_the_papers_formula_is_timed_beside_ours(bench, tmp_path):
    rows = ran(bench, "peers", tmp_path, "--method", "actmat", "--method", "actmat, pinv", "--repeats", "1")
    assert [(row["method"], row["way"]) for row in rows] == [
        (method, way) for method in ("actmat", "actmat, pinv") for way in ("streammerge", "paper")
    ]
    for row in rows[1::2]:
        assert row["seconds_over_streammerge"]["ratio"] > 0.0
        assert row["difference"] < 0.01
    assert "<svg" not in (tmp_path / "results" / "peers.html").read_text()


def test_no_ratio_is_recorded_where_outputs_differ(bench, tmp_path):
    peers, run = bench("peers"), dict.fromkeys(bench("peers").FACTS, 2.0)
    given = argparse.Namespace(size="tiny", results=tmp_path)
    cell = {"method": "linear", "layers": 2, "experts": 3, "parameters": 10}
    runs = {"streammerge": [run], "mergekit": [{**run, "seconds": 6.0}], "paper": [run]}
    apart = {"mergekit": {"difference": 0.001, "peer_off_own_formula": 0.03}, "paper": {"difference": 0.02}}
    lines = peers.record(given, cell, runs, apart)
    assert [line[3] for line in lines] == ["-", "3.00", "differs"]
    rows = [json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines()]
    assert ["seconds_over_streammerge" in row for row in rows] == [False, True, False]
    # a peer's own inaccuracy is told
    assert [row.get("peer_off_own_formula") for row in rows] == [None, 0.03, None]
    # of two sizes a picture is drawn
    peers.record(given, {**cell, "parameters": 20}, runs, {})
    peers.pictures(tmp_path)
    assert (tmp_path / "peers.html").read_text().count("<svg") >= 2


def test_a_ratios_interval_holds_the_ratio_and_is_a_students(bench):
    ratio, low, high = bench("peers").ratio_with_interval([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0))
    ratio, low, high = bench("peers").ratio_with_interval([1.0, 1.0], [1.0, math.e**2])
    assert (math.log(ratio), math.log(high) - 1.0) == pytest.approx((1.0, 12.71))
    assert bench("peers").ratio_with_interval([2.0], [3.0]) == (pytest.approx(1.5), None, None)


def test_the_page_of_scale_is_what_its_script_writes(bench):
    on_paper = bench("on_paper")
    assert on_paper.PAGE.read_text() == on_paper.newest_page(BENCH / "results")
    row = json.loads((BENCH / "results" / "on_paper.jsonl").read_text().splitlines()[-1])
    kind, shapes = on_paper.MODELS[on_paper.CHECKED]
    assert asdict(on_paper.need(shapes(), kind)) == row["needs"][on_paper.CHECKED]


def test_models_on_paper_have_the_parameters_of_their_names(bench):
    on_paper = bench("on_paper")
    found = {name: sum(map(math.prod, shapes().values())) for name, (_, shapes) in on_paper.MODELS.items()}
    assert [round(count / 1e9) for count in found.values()] == [71, 406, 671]


def test_on_paper_the_longest_part_binds_and_memory_may_be_too_small(bench):
    on_paper = bench("on_paper")
    need = on_paper.Need(
        parameters=1, tensors=1, flops=100, input_bytes=40, output_bytes=10, read_bytes=60, memory_bytes=5,
        device_read_bytes=40, device_host_memory_bytes=4, device_memory_bytes=7,
    )  # fmt: skip
    host = on_paper.Machine(
        name="m", flops_per_second=10, read_bytes_per_second=3, write_bytes_per_second=1, memory_bytes=5, source="s"
    )
    assert on_paper.outcome(need, host) == {"limit": "reading", "memory_bytes": 5, "seconds": 20.0}
    assert on_paper.outcome(need, replace(host, memory_bytes=4))["limit"] == "memory"
    device = replace(host, device_memory_bytes=7, bus_bytes_per_second=2)
    assert on_paper.outcome(need, device) == {"limit": "bus", "memory_bytes": 4, "seconds": 25.0}
    assert on_paper.outcome(need, replace(device, device_memory_bytes=6))["limit"] == "device memory"
