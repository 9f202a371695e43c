"""A diagnosis: against dense float64, the same for any budget and any threads, and advice that follows its rules."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner

from streammerge import api, methods
from streammerge.cli import cli
from streammerge.diagnosis import run, sketch
from streammerge.diagnosis.advice import advice, at_peak, lost_share, whole_cosines, whole_norms
from streammerge.diagnosis.result import Findings, MatrixFindings, pairs
from streammerge.diagnosis.sketch import SKETCH, RowSketches, sketched
from streammerge.errors import MergeError, PlanError
from streammerge.recipe import Recipe
from streammerge.reporting.diagnosis_page import diagnosis_page
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.pages import assert_stands_alone, parsed, sections
from tests.stored import MemoryStorage

TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}


def looked(models, *, memory=1 << 30, merged=(), **more):
    names = [name for name in models if name != "base" and name not in merged]
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": name} for name in names], **more}
    return run.diagnose(Recipe.from_dict(recipe), MemoryStorage(models), merged=merged, memory_bytes=memory)


def family(scale=0.002, dtype=torch.bfloat16):
    base = llama_tensors(dtype=dtype)
    return {"base": base, **{f"expert{i}": tuned(base, i + 1, scale) for i in range(3)}}


def matrix_model(base, *changes):
    """Models of one matrix."""
    name = "model.layers.0.self_attn.q_proj.weight"
    return {"base": {name: base}, **{f"expert{i}": {name: base + change} for i, change in enumerate(changes)}}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def interference(merged, changes):
    wrong = sum(((merged - change) @ change.T).square().sum() for change in changes)
    return (wrong / sum((change @ change.T).square().sum() for change in changes)).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_exact_is_that_of_dense_float64(dtype):
    models = family(dtype=dtype)
    found = {each.name: each for each in looked(models, out_dtype="bfloat16").tensors}
    assert set(found) == {name for name, tensor in models["base"].items() if tensor.is_floating_point()}
    for name, each in found.items():
        base, *experts = (models[model][name].double() for model in models)
        changes = [expert - base for expert in experts]
        assert each.base_norm == pytest.approx(base.norm().item(), rel=1e-6)
        assert each.expert_norms == pytest.approx([c.norm().item() for c in changes], rel=1e-6)
        flat = torch.stack([c.flatten() / c.norm() for c in changes])
        assert each.cosines == pytest.approx([(flat[s] @ flat[t]).item() for s, t in pairs(3)], abs=1e-6)
        assert each.zeros == pytest.approx([(c == 0).double().mean().item() for c in changes], abs=1e-12)
        rounded = base.to(torch.bfloat16)
        for change, share in zip(changes, each.below_half_ulp, strict=True):
            lost = ((base + change).to(torch.bfloat16) == rounded) & (change != 0)
            assert share == pytest.approx((lost.sum() / max((change != 0).sum(), 1)).item(), abs=2e-3)
        mean = sum(changes) / 3
        lost = ((base + mean).to(torch.bfloat16) == rounded) & (mean != 0)
        assert each.mean_lost == pytest.approx((lost.sum() / (mean != 0).sum()).item(), abs=0.02 + 2 / base.numel())
        assert each.shape == tuple(base.shape)


def test_every_half_ulp_counts():
    base = torch.full((8, 8), 1.0)
    change = torch.zeros(8, 8)
    # bfloat16 has an ulp of 2⁻⁷ above 1: its half is a tie, and goes back to 1, which is even
    change[0, :3] = torch.tensor([2.0**-9, 2.0**-8, 2.0**-7])
    (found,) = looked(matrix_model(base, change, 2 * change), out_dtype="bfloat16").tensors
    assert found.below_half_ulp == pytest.approx((2 / 3, 1 / 3))
    assert found.zeros == (61 / 64, 61 / 64)


DENSE = {
    "random": lambda: [random(96, 64, seed=i) for i in range(3)],
    "wide": lambda: [random(40, 200, seed=i) for i in range(2)],
    "unequal": lambda: [random(80, 80, seed=i) * 10.0**-i for i in range(3)],
    "low rank": lambda: [random(96, 6, seed=i) @ random(6, 64, seed=9 + i) for i in range(3)],
    "shared": lambda: [random(96, 8, seed=i) @ random(8, 64, seed=9) + 0.1 * random(96, 64, seed=5) for i in range(3)],
}


@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("transposed", [False, True], ids=["[out, in]", "[in, out]"])
def test_what_is_estimated_is_near_dense_float64(case, transposed):
    """By the mean of several seeds, as each is a draw, and each seed by itself within what the module says."""
    changes = [change.double() for change in DENSE[case]()]
    rows, columns = changes[0].shape
    found = []
    with run.ThreadPoolExecutor(1) as workers:
        for seed in range(8):
            shape = (columns, rows) if transposed else (rows, columns)
            sketches = RowSketches("a", shape, len(changes), transposed=transposed, seed=seed, dtype=torch.float64)
            sketches.add([(change.T if transposed else change).contiguous() for change in changes], workers)
            norms = [change.square().sum().item() for change in changes]
            assert (sketches.rows, sketches.columns) == (rows, columns)
            found.append(sketched(sketches.finish(workers), norms, rows, len(changes)))
    total, mean = sum(changes), sum(changes) / len(changes)
    grams = [change.T @ change for change in changes]
    whole = sum(grams)
    linear = sum(((total @ c.T) * (c @ c.T)).sum() for c in changes)
    scale = (linear / sum((total @ c.T).square().sum() for c in changes)).item()
    expected = {
        "interference_mean": interference(mean, changes),
        "interference_sum": interference(total, changes),
        "scale": scale,
        "conflict": interference(scale * total, changes),
        "effective_rank": (whole.trace().square() / whole.square().sum()).item(),
        "condition": 1.0 + columns / 0.1 * (whole.norm() / whole.trace()).item(),
    }
    for key, value in expected.items():
        values = [getattr(each, key) for each in found]
        assert sum(values) / len(values) == pytest.approx(value, rel=0.15, abs=0.02), key
        assert values == pytest.approx([value] * len(values), rel=0.5, abs=0.06), key
    for place, (s, t) in enumerate(pairs(len(changes))):
        overlap = ((grams[s] * grams[t]).sum() / (grams[s].norm() * grams[t].norm())).item()
        assert [each.overlaps[place] for each in found] == pytest.approx([overlap] * len(found), abs=0.2)
    assert found[0].peak == len(changes) * rows / columns


def test_a_sketch_of_enough_columns_is_exact_where_experts_read_different_inputs():
    changes = [torch.zeros(32, 64) for _ in range(2)]
    changes[0][:, :32], changes[1][:, 32:] = random(32, 32), random(32, 32, seed=1)
    (found,) = looked(matrix_model(torch.zeros(32, 64), *changes)).tensors
    assert found.matrix.overlaps == (0.0,)
    assert found.matrix.interference_sum == pytest.approx(0.0, abs=1e-10)
    assert found.matrix.conflict == pytest.approx(0.0, abs=1e-10)
    assert found.matrix.scale == pytest.approx(1.0, rel=1e-6)
    assert found.matrix.interference_mean == pytest.approx(0.25, rel=1e-6)


def test_opposite_experts_are_in_full_conflict_and_equal_ones_in_none():
    change = random(32, 64)
    (opposed,) = looked(matrix_model(torch.zeros(32, 64), change, -change)).tensors
    assert opposed.cosines == pytest.approx((-1.0,))
    assert (opposed.matrix.conflict, opposed.matrix.interference_mean) == pytest.approx((1.0, 1.0))
    (equal,) = looked(matrix_model(torch.zeros(32, 64), change, change)).tensors
    assert equal.matrix.conflict == pytest.approx(0.0, abs=1e-10)
    assert equal.matrix.scale == pytest.approx(0.5, rel=1e-6)
    assert equal.matrix.overlaps == pytest.approx((1.0,))


def test_a_matrix_that_nobody_changed_has_no_findings_and_an_idle_expert_does_not_count():
    change = random(32, 64)
    (none,) = looked(matrix_model(random(32, 64), torch.zeros(32, 64), torch.zeros(32, 64))).tensors
    assert none.matrix is None
    assert (none.expert_norms, none.cosines, none.zeros) == ((0.0, 0.0), (None,), (1.0, 1.0))
    (one,) = looked(matrix_model(torch.zeros(32, 64), change, torch.zeros(32, 64))).tensors
    assert one.matrix.peak == 0.5
    assert one.matrix.effective_ranks[1] is None
    assert one.matrix.overlaps == (None,)
    assert one.matrix.scale == pytest.approx(1.0, rel=1e-6)


def test_changes_of_any_size_have_the_same_shape():
    changes = [random(48, 48, seed=i).double() for i in range(3)]
    small = [(change * 1e-60) for change in changes]
    zero = torch.zeros(48, 48, dtype=torch.float64)
    (found,), (tiny,) = (looked(matrix_model(zero, *each)).tensors for each in (changes, small))
    assert tiny.matrix.conflict == pytest.approx(found.matrix.conflict, rel=1e-9)
    assert tiny.matrix.effective_rank == pytest.approx(found.matrix.effective_rank, rel=1e-9)


def test_finished_merges_are_measured_on_the_same_scale():
    changes = [random(64, 64, seed=i) for i in range(2)]
    models = matrix_model(torch.zeros(64, 64), *changes)
    name = next(iter(models["base"]))
    models |= {"mean": {name: sum(changes) / 2}, "sum": {name: sum(changes)}, "base again": {name: torch.zeros(64, 64)}}
    told = looked(models, merged=("mean", "sum", "base again"))
    (found,) = told.tensors
    assert told.merged == ("mean", "sum", "base again")
    assert told.experts == ("expert0", "expert1")
    assert found.matrix.interference_merged == pytest.approx(
        (found.matrix.interference_mean, found.matrix.interference_sum, 1.0), rel=1e-5
    )
    assert len(found.expert_norms) == len(found.zeros) == 2
    without = looked({key: models[key] for key in ("base", "expert0", "expert1")}).tensors[0]
    assert without.matrix.interference_mean == pytest.approx(found.matrix.interference_mean, rel=1e-12)


def test_a_real_merge_and_its_diagnosis_agree(family, tmp_path):
    api.merge(recipe_of(family), tmp_path / "merged")
    noted = {entry["name"]: entry["facts"] for entry in
             json.loads((tmp_path / "merged" / "streammerge.json").read_text())["tensors"]}  # fmt: skip
    found = api.diagnose(recipe_of(family), merged=[tmp_path / "merged"], memory="256MiB")
    values = [(noted[f.name]["interference"], matrix.interference_merged[0]) for f, matrix in found.matrices]
    assert sum(abs(own - told) for own, told in values) / len(values) < 0.1


@pytest.mark.parametrize("threads", [1, 3])
def test_budget_and_threads_make_no_difference(monkeypatch, threads):
    base = {"model.embed_tokens.weight": random(300, 200), "model.layers.0.self_attn.q_proj.weight": random(300, 200),
            "model.layers.0.mlp.down_proj.weight": random(200, 333), "model.norm.weight": random(200)}  # fmt: skip
    models = {"base": base, **{f"expert{i}": tuned(base, i, 0.01) for i in range(3)}}
    first = looked(models, out_dtype="bfloat16")
    monkeypatch.setattr(run, "thread_limit", lambda: threads)
    from streammerge import memory

    monkeypatch.setattr(memory, "LARGEST_SLOT_BYTES", 64 << 10)
    second = looked(models, memory=96 << 20, out_dtype="bfloat16")
    assert second.tensors == first.tensors
    assert second.advice == first.advice


def test_each_byte_is_read_once_within_the_budget():
    models = family()
    found = looked(models)
    floats = sum(t.numel() * t.element_size() for t in models["base"].values() if t.is_floating_point())
    assert found.read_bytes == 4 * floats
    assert found.left_out == 1


def test_memory_stays_within_the_budget(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    base = {f"model.layers.{i}.mlp.up_proj.weight": random(4096, 2048, seed=i).bfloat16() for i in range(4)}
    folders = {"base": save_model(tmp_path / "base", base)}
    for number in range(3):
        folders[f"e{number}"] = save_model(tmp_path / f"e{number}", tuned(base, number))
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "kernels")]!r}
import torch, streammerge.diagnosis.run, streammerge.storage.local
from streammerge.memory_samples import anonymous_bytes
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
before, most = anonymous_bytes(), [0]
from streammerge import api
api.diagnose({recipe_of(folders)!r}, memory="160MiB",
             progress=lambda *_: most.__setitem__(0, max(most[0], anonymous_bytes() - before)))
print(most[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=80, check=True)
    assert 1 << 20 < int(done.stdout) < 160 << 20


def test_a_budget_too_small_is_refused_with_one_that_is_enough():
    with pytest.raises(PlanError, match="a diagnosis of these models needs a budget of") as caught:
        looked(family(), memory=8 << 20)
    enough = int(caught.value.hint.split("--memory ")[1].split("MiB")[0])
    assert looked(family(), memory=enough << 20).tensors


def test_a_recipe_without_a_base_and_one_that_keeps_all_are_refused():
    models = family()
    recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": "expert0"}, {"model": "expert1"}]})
    with pytest.raises(PlanError, match="has no `base_model`"):
        run.diagnose(recipe, MemoryStorage(models))
    with pytest.raises(PlanError, match="merges no tensor"):
        looked(models, rules=[{"match": ".", "keep": "base"}])


def test_what_the_recipe_keeps_is_left_out():
    found = looked(family(), rules=[{"match": "embed_tokens|lm_head", "keep": "base"}])
    assert not [each for each in found.tensors if "embed" in each.name or "lm_head" in each.name]
    assert found.left_out == 3


def test_a_nan_is_named():
    models = family()
    models["expert1"]["model.layers.1.mlp.up_proj.weight"][3, 2] = math.nan
    with pytest.raises(
        MergeError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight` in `expert1` holds NaN at \[3, 2\]"
    ):
        looked(models)


def matrix(**more):
    told = {
        "rows": 64, "columns": 64, "peak": 2.0, "effective_ranks": (9.0, 9.0), "effective_rank": 12.0,
        "condition": 50.0, "overlaps": (0.3,), "interference_mean": 0.6, "interference_sum": 0.7, "scale": 0.8,
        "conflict": 0.5,
    }  # fmt: skip
    return MatrixFindings(**{**told, **more})


def findings(name="model.layers.0.self_attn.q_proj.weight", **more):
    told = {
        "name": name, "kind": "matrix", "shape": (64, 64), "dtype": "BF16", "base_norm": 1.0,
        "expert_norms": (0.1, 0.1), "cosines": (0.0,), "zeros": (0.1, 0.1), "below_half_ulp": (0.0, 0.0),
        "mean_lost": 0.01, "matrix": matrix(),
    }  # fmt: skip
    return Findings(**{**told, **more})


EXPERTS = ("math", "code")


def test_the_bound_of_the_condition_is_that_of_actmats_default_ridge():
    assert methods.describe("actmat").parameters["ridge"].default == sketch._RIDGE
    for seed in range(4):
        changes = [random(96, 64, seed=9 * seed + i).double() * 3.0**-i for i in range(3)]
        (found,) = looked(matrix_model(torch.zeros(96, 64, dtype=torch.float64), *changes)).tensors
        covariance = sum(change.T @ change for change in changes)
        ridge = 0.1 * covariance.trace() / 64 * torch.eye(64, dtype=torch.float64)
        assert torch.linalg.cond(covariance + ridge).item() <= 1.1 * found.matrix.condition


@pytest.mark.parametrize(
    ("found", "method", "parameters", "settings", "told"),
    [
        (findings(), "actmat", {}, {}, "interference of 0.50"),
        (findings(matrix=matrix(interference_mean=0.03, conflict=0.02)), "linear", {}, {}, "experts agree"),
        (
            findings(matrix=matrix(interference_mean=0.3, conflict=0.02, scale=0.97)),
            "task_arithmetic", {"weight": 0.97}, {}, "hardly meet",
        ),
        (findings(matrix=None), "linear", {}, {}, "no expert changed a matrix"),
        (findings(expert_norms=(0.1, 0.4)), "actmat", {"weight_exponent": 1.0}, {}, "`code` is 4.0 times as long"),
        (findings(mean_lost=0.4), "actmat", {}, {"rounding": "stochastic"}, "lose 40%"),
    ],
    ids=["conflict", "agreement", "apart", "unchanged", "loud", "rounding"],
)  # fmt: skip
def test_advice_follows_its_rules_and_says_why(found, method, parameters, settings, told):
    given = advice([found], EXPERTS)
    assert (given.method, given.parameters, given.settings) == (method, parameters, settings)
    assert any(told in reason for reason in given.reasons)
    assert given.notes[-1].startswith("This is read off weights alone")
    recipe = {"merge_method": given.method, "base_model": "b", "models": [{"model": "m"}, {"model": "c"}]}
    Recipe.from_dict({**recipe, "parameters": dict(given.parameters), **given.settings})


def test_pooling_is_advised_where_neighbours_at_the_peak_share_an_input():
    prefix = "model.layers.0.self_attn."
    both = [findings(f"{prefix}{kind}.weight", matrix=matrix(peak=1.1)) for kind in ("q_proj", "k_proj")]
    assert advice(both, EXPERTS).parameters == {"pool": "inputs"}
    alone = advice([findings("model.layers.0.mlp.down_proj.weight", matrix=matrix(peak=1.1))], EXPERTS)
    assert alone.parameters == {}
    assert any("share no input" in note and "`model.layers.0.mlp.down_proj.weight`" in note for note in alone.notes)
    assert advice(both[:1], EXPERTS).parameters == {}
    assert [at_peak(matrix(peak=peak)) for peak in (0.79, 0.8, 1.25, 1.26)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"expert_norms": (0.1, 0.0), "cosines": (None,)}, "`code` is the base"),
        ({"cosines": (-0.4,)}, "`math` and `code` pull in opposite directions: the cosine of their changes is -0.40"),
        ({"cosines": (0.99,)}, "`math` and `code` made nearly the same change"),
        ({"zeros": (0.95, 0.99)}, "changes are sparse"),
        ({}, "most conflict is to be expected in `model.layers.0.self_attn.q_proj.weight` (0.50)"),
    ],
)
def test_notes_name_what_stands_out(more, told):
    assert any(told in note for note in advice([findings(**more)], EXPERTS).notes)


def test_changes_outside_of_linear_layers_are_told():
    found = [findings(), findings("lm_head.weight", kind="embedding", matrix=None, expert_norms=(1.0, 1.0))]
    assert any("99% of the changes' squared norm lies outside" in note for note in advice(found, EXPERTS).notes)


def test_figures_of_the_whole_model_add_up():
    models = family()
    told = looked(models)
    changes = [
        torch.cat([(expert[n].double() - models["base"][n].double()).flatten() for n in models["base"]
                   if models["base"][n].is_floating_point()])
        for expert in list(models.values())[1:]
    ]  # fmt: skip
    assert whole_norms(told.tensors) == pytest.approx([change.norm().item() for change in changes], rel=1e-6)
    expected = [(changes[s] @ changes[t] / changes[s].norm() / changes[t].norm()).item() for s, t in pairs(3)]
    assert whole_cosines(told.tensors) == pytest.approx(expected, abs=1e-6)
    assert 0.0 < lost_share(told.tensors) < 1.0


def test_the_page_says_what_the_numbers_say():
    models = family()
    told = looked(models)
    page = diagnosis_page(told)
    assert_stands_alone(page)
    found = sections(parsed(page))
    assert f"Begin with {told.advice.method}" in found
    heat = found["Conflict"].all("table")[0].rows
    by_name = {each.name: each.matrix for each in told.tensors}
    for layer, *cells in heat[1:]:
        for kind, cell in zip(heat[0][1:], cells, strict=True):
            part = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            assert cell == f"{by_name[f'model.layers.{layer}.{part}.{kind}.weight'].conflict:.2f}"
    alike = found["How alike the experts are"].all("table")[0].rows
    assert alike[0] == ["cosine", "expert0", "expert1", "expert2"]
    assert [row[place] for place, row in enumerate(alike[1:], 1)] == ["1"] * 3
    reasons = [item.text for item in found[f"Begin with {told.advice.method}"].all("li")]
    assert reasons == [line.replace("`", "") for line in (*told.advice.reasons, *told.advice.notes)]


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\u202ea\x1b[2J"])
def test_hostile_names_stay_text(hostile):
    base = {f"model.layers.0.{hostile}.q_proj.weight": random(32, 32), hostile: random(8, 8)}
    models = {"base": base, hostile: tuned(base, 1, 0.1), "other": tuned(base, 2, 0.1)}
    page = diagnosis_page(looked(models))
    assert_stands_alone(page)
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_command_tells_and_writes(family, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(family)))
    out = tmp_path / "diagnosis"
    done = CliRunner().invoke(cli, ["diagnose", str(recipe), "-o", str(out), "-q"], catch_exceptions=False)
    told = json.loads((out / "diagnosis.json").read_text())
    assert f"begin with {told['advice']['method']}" in done.output
    assert told["format"] == 1
    assert sections(parsed((out / "diagnosis.html").read_text()))
    again = CliRunner().invoke(cli, ["diagnose", str(recipe), "--json", "-q"], catch_exceptions=False)
    assert json.loads(again.stdout)["tensors"] == told["tensors"]
    assert sorted(path.name for path in out.iterdir()) == ["diagnosis.html", "diagnosis.json"]


def test_signs_depend_on_the_tensor_and_the_seed():
    def drawn(name, seed):
        with run.ThreadPoolExecutor(1) as workers:
            sketches = RowSketches(name, (16, 16), 1, transposed=False, seed=seed, dtype=torch.float64)
            sketches.add([torch.eye(16, dtype=torch.float64)], workers)
            return sketches.finish(workers)[0]

    first = drawn("a", 0)
    assert first.shape == (SKETCH, 16)
    assert set(first.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(first, drawn("a", 0))
    assert not torch.equal(first, drawn("b", 0))
    assert not torch.equal(first, drawn("a", 1))
