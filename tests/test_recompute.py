"""Merging a sample again in float64: what a recipe and its inputs give is recognised, anything else is found."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge
from streammerge import memory, methods
from streammerge.outcome import Block
from streammerge.recompute import sampled, unexplained
from streammerge.stream import Stream
from streammerge.verification import Verification
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.stored import tensors_of
from tests.test_every_method import PARAMETERS, beside_of, experts_of, family_of
from tests.test_verification import change

NOT_WHAT_IT_GIVES = "it is not what the recipe and inputs give"


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three experts with half of their change in common."""
    root, base = tmp_path_factory.mktemp("relatives"), llama_tensors()
    folders = {"base": save_model(root / "base", base, shards=2)}
    return folders | {f"e{i}": save_model(root / f"e{i}", tensors) for i, tensors in enumerate(family_of(base, 3))}


def recipe_for(method: str, relatives: dict[str, Path], folder: Path, **more: object) -> dict[str, object]:
    few = dict(list(relatives.items())[: 1 + experts_of(method)])
    recipe = recipe_of(few, method, parameters=PARAMETERS.get(method, {}), seed=3, **more)
    if beside := methods.describe(method).beside:
        (folder / "data").mkdir()
        save_file(beside_of(method, llama_tensors()), folder / "data" / "model.safetensors")
        recipe["models"] = [{"model": str(path), beside: str(folder / "data")} for path in list(few.values())[1:]]
    return recipe


def same_in_float64(out: Path, count: int = 100) -> Verification:
    found = streammerge.verify(out, recompute=count)
    assert found.problems == ()
    assert found.unchecked == ()
    return found


@pytest.mark.parametrize("method", methods.names())
def test_every_method_gives_in_float64_what_it_gave(method, relatives, tmp_path):
    streammerge.merge(recipe_for(method, relatives, tmp_path, out_dtype="float32"), tmp_path / "out")
    found = same_in_float64(tmp_path / "out")
    assert len(found.recomputed) == 20
    beyond = [each for each in found.recomputed if each.difference > each.allowed]
    # what falls otherwise in float64 is what a note tells of
    assert len(beyond) == len(found.notes)
    assert not beyond or method == "sce"


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_outputs_rounding_is_no_difference(relatives, tmp_path, out_dtype, rounding):
    recipe = recipe_for("dare_linear", relatives, tmp_path, out_dtype=out_dtype, rounding=rounding)
    streammerge.merge(recipe, tmp_path / "out", max_shard_size="6KB")
    found = same_in_float64(tmp_path / "out")
    assert max(each.difference for each in found.recomputed) < 1e-6


@pytest.mark.parametrize("solver", ["pinv", "exact", "top_k", "flow"])
def test_every_solver_gives_again_what_it_gave(relatives, tmp_path, solver):
    streammerge.merge(recipe_of(relatives, "actmat", parameters={"solver": solver}), tmp_path / "out")
    assert len(same_in_float64(tmp_path / "out").recomputed) == 20


def test_a_sample_leaves_its_pools_other_members_out_of_the_answer_only(relatives, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "centres_rows", "tests.odd_methods")
    streammerge.merge(recipe_of(relatives, "centres_rows", parameters={"pool": "inputs"}), tmp_path / "out")
    for count in (1, 3, 100):
        assert len(same_in_float64(tmp_path / "out", count).recomputed) == min(count, 20)


@pytest.mark.parametrize(
    ("method", "parameters"), [("ties", {"density": 0.3, "trim": "model"}), ("larv", {"rule": "actmat"})]
)
def test_a_look_at_the_model_sees_all_of_it_for_a_sample_too(relatives, tmp_path, method, parameters):
    streammerge.merge(recipe_of(relatives, method, parameters=parameters), tmp_path / "out")
    assert len(same_in_float64(tmp_path / "out", 2).recomputed) == 2


def test_matrices_stored_transposed_and_rules_and_models_without_a_base_are_merged_again(tmp_path):
    tensors = {"transformer.h.0.attn.c_attn.weight": torch.randn(16, 48), "transformer.h.0.ln_1.weight": torch.ones(16)}
    base = save_model(tmp_path / "base", tensors)
    config = json.loads((base / "config.json").read_text())
    folders = {"base": base} | {f"e{i}": save_model(tmp_path / f"e{i}", tuned(tensors, i)) for i in (1, 2)}
    for folder in folders.values():
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    rules = [{"match": "ln_1", "keep": "base"}]
    streammerge.merge(recipe_of(folders, "actmat", rules=rules), tmp_path / "out")
    assert {each.method for each in same_in_float64(tmp_path / "out").recomputed} == {"actmat", "copy"}
    del folders["base"]
    recipe = {"merge_method": "linear", "models": [{"model": str(folder)} for folder in folders.values()]}
    streammerge.merge(recipe, tmp_path / "soup")
    assert len(same_in_float64(tmp_path / "soup").recomputed) == 2


def blocks_of(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many runs each tensor comes in from now on."""
    seen: Counter[str] = Counter()
    real = Stream.__iter__

    def counted(stream: Stream) -> Iterator[Block]:
        for block in real(stream):
            seen[block.name] += 1
            yield block

    monkeypatch.setattr(Stream, "__iter__", counted)
    return seen


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "actmat"])
def test_what_a_merge_cut_into_blocks_is_compared_with_whole_tensors(relatives, tmp_path, monkeypatch, method):
    with monkeypatch.context() as patch:
        for name in ("LARGEST_SLOT_BYTES", "SMALLEST_SLOT_BYTES"):
            patch.setattr(memory, name, 1 << 7)
        merged = blocks_of(patch)
        streammerge.merge(recipe_for(method, relatives, tmp_path), tmp_path / "out")
    assert max(merged.values()) > 4
    again = blocks_of(monkeypatch)
    assert len(same_in_float64(tmp_path / "out").recomputed) == 20
    assert set(again.values()) == {1}


def test_a_small_budget_compares_block_by_block_each_in_its_place(relatives, tmp_path, monkeypatch):
    streammerge.merge(recipe_of(relatives, "linear"), tmp_path / "out")
    for name in ("LARGEST_SLOT_BYTES", "SMALLEST_SLOT_BYTES"):
        monkeypatch.setattr(memory, name, 1 << 7)
    again = blocks_of(monkeypatch)
    # room for small slots beside the reserve
    found = streammerge.verify(tmp_path / "out", recompute=100, memory=memory.RESERVE_BYTES + 100 * 128)
    assert (found.problems, len(found.recomputed)) == ((), 20)
    assert max(again.values()) > 4


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.position_ids"])
def test_another_value_is_found_though_the_checksum_was_forged(relatives, tmp_path, name):
    streammerge.merge(recipe_of(relatives, "actmat"), tmp_path / "out")
    before = tensors_of(tmp_path / "out")[name].view(-1).view(torch.uint8)
    # the exponent's or the number's lowest bit
    change(tmp_path / "out", name, 1, bytes([int(before[1]) ^ 1]))
    forged = tensors_of(tmp_path / "out")[name].view(-1).view(torch.uint8).numpy().tobytes()
    report = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    next(t for t in report["tensors"] if t["name"] == name)["sha256"] = hashlib.sha256(forged).hexdigest()
    (tmp_path / "out" / "streammerge.json").write_text(json.dumps(report))
    assert streammerge.verify(tmp_path / "out", inputs=True).problems == ()
    problems = streammerge.verify(tmp_path / "out", recompute=100).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"`{name}` ")
    assert problems[0].endswith(NOT_WHAT_IT_GIVES)


def test_inputs_whose_values_alone_changed_are_found(relatives, tmp_path):
    folders = {name: save_model(tmp_path / name, tensors_of(folder)) for name, folder in relatives.items()}
    streammerge.merge(recipe_of(folders, "linear"), tmp_path / "out")
    change(folders["e1"], "lm_head.weight", 1, b"\x40")
    problems = streammerge.verify(tmp_path / "out", recompute=100).problems
    assert len(problems) == 1
    assert "`lm_head.weight` (linear)" in problems[0]
    change(folders["e1"], "lm_head.weight", 0, b"\xff\xff")
    problems = streammerge.verify(tmp_path / "out", recompute=100).problems
    assert problems[0].startswith("the inputs cannot be merged any more: `lm_head.weight` in `e1` holds NaN")


def test_another_seed_than_the_reports_gives_other_draws(relatives, tmp_path):
    streammerge.merge(recipe_for("dare_linear", relatives, tmp_path), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    report["recipe"]["seed"] = 4
    (tmp_path / "out" / "streammerge.json").write_text(json.dumps(report))
    assert len(streammerge.verify(tmp_path / "out", recompute=100).problems) == 19


def test_another_method_dtype_or_shape_than_the_recipes_is_named(relatives, tmp_path):
    streammerge.merge(recipe_of(relatives, "linear"), tmp_path / "out")
    path = tmp_path / "out" / "streammerge.json"
    report = json.loads(path.read_text())
    report["recipe"] |= {"merge_method": "actmat"}
    path.write_text(json.dumps(report))
    problems = streammerge.verify(tmp_path / "out", recompute=100).problems
    assert len(problems) == 14
    assert all(line.endswith("was merged by `linear`, and the recipe gives `actmat`") for line in problems)
    report["recipe"] |= {"merge_method": "linear", "out_dtype": "float32"}
    path.write_text(json.dumps(report))
    problems = streammerge.verify(tmp_path / "out", recompute=100).problems
    assert "`model.norm.weight` is BF16 [16], and the recipe gives F32 [16]" in problems


# the sample


def steps_of(relatives: dict[str, Path]) -> list[object]:
    rules = [{"match": "k_proj", "keep": "base"}, {"match": "v_proj", "merge_method": "ties"}]
    return list(streammerge.plan(recipe_of(relatives, "actmat", rules=rules)).steps)


def test_a_sample_has_one_of_each_method_and_class_first(relatives):
    steps = steps_of(relatives)
    methods_there, kinds = {s.method for s in steps}, {s.role.kind for s in steps}
    assert (len(methods_there), len(kinds)) == (4, 4)
    for seed in range(20):
        drawn = sampled(steps, 5, seed)
        assert {s.method for s in drawn} == methods_there
        assert {s.role.kind for s in drawn} == kinds


def test_a_sample_is_drawn_by_its_seed_and_grows(relatives):
    steps = steps_of(relatives)
    for count in range(22):
        drawn = sampled(steps, count, 0)
        assert len(drawn) == min(count, 20)
        assert drawn == sampled(steps, count, 0)
        assert {s.name for s in drawn} <= {s.name for s in sampled(steps, count + 1, 0)}
        assert [s.name for s in drawn] == [s.name for s in steps if s in drawn]
    assert len({tuple(s.name for s in sampled(steps, 8, seed)) for seed in range(20)}) > 10


# rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_to_nearest_explains_itself_and_no_more(dtype):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(50_000, generator=generator, dtype=torch.float64)
    exact *= torch.pow(10.0, torch.randint(-9, 5, exact.shape, generator=generator).double())
    stored = exact.to(dtype)
    assert float(unexplained(stored.double(), exact, dtype, units=0.5, wide=True).max()) == 0.0
    away = torch.nextafter(stored, torch.full_like(stored, math.inf) * (stored >= exact).to(dtype).mul(2).sub(1))
    moved = unexplained(away.double(), exact, dtype, units=0.5, wide=True)
    if dtype is not torch.float64:
        assert float((moved > 0).double().mean()) > 0.99
        assert float(unexplained(away.double(), exact, dtype, units=1.0, wide=True).max()) > 0.0


def test_what_a_dtype_cannot_hold_is_an_infinity_and_nothing_else():
    stored = torch.tensor([math.inf, math.inf, -math.inf, math.nan, math.nan, 1.0], dtype=torch.float64)
    exact = torch.tensor([1e5, 1.0, 1e5, math.nan, 1.0, math.nan], dtype=torch.float64)
    found = unexplained(stored, exact, torch.float16, units=0.5, wide=False)
    assert found.tolist() == [0.0, math.inf, math.inf, 0.0, math.inf, math.inf]
