"""Mixtures of experts: stacks merged matrix by matrix, and models of transformers from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammerge
from streammerge import memory, methods, write
from streammerge import models as model_views
from streammerge.checkpoint import Checkpoint
from streammerge.device_memory import step_device_bytes
from streammerge.errors import MergeError, PlanError
from streammerge.memory import step_workspace_bytes
from streammerge.outcome import Facts, add_facts
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from streammerge.stream import Stream
from tests import crashing, odd_methods
from tests.models import recipe_of, save_model
from tests.stored import MemoryStorage, digests, merged_in_memory, streamed, streamed_tensors, tensor_of
from tests.test_derived import scaled
from tests.test_device_stream import engine, planned

STACK = "model.layers.0.mlp.experts.gate_up_proj"
# each stored as one matrix, in the same orientation
ALONE = {False: "model.layers.{}.mlp.up_proj.weight", True: "h.{}.mlp.c_fc.weight"}
STACKED_CONFIG = {False: {"model_type": "qwen3_moe"}, True: {"model_type": "gpt_oss"}}
ALONE_CONFIG = {False: {"model_type": "llama"}, True: {"model_type": "gpt2"}}
RULES: dict[str, dict[str, object]] = {
    "ridge": {"merge_method": "actmat"},
    "exact": {"merge_method": "actmat", "parameters": {"solver": "exact"}},
    "pinv": {"merge_method": "actmat", "parameters": {"solver": "pinv"}},
    "tsv": {"merge_method": "tsv"},
    "iso_c": {"merge_method": "iso_c"},
    "wudi": {"merge_method": "wudi", "parameters": {"iterations": 5}},
    "larv": {"merge_method": "larv"},
    "reads on": {"merge_method": "asks_twice"},
}
DEVICES = pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])
SIDES = pytest.mark.parametrize("transposed", [False, True], ids=["out by in", "in by out"])


@pytest.fixture(autouse=True)
def _odd_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in odd_methods.NAMES:
        monkeypatch.setitem(methods.METHODS, name, "tests.odd_methods")


def drawn(shape: tuple[int, ...], models: int = 4, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """A base's tensor and its experts', which moved a little."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    return [base] + [
        (base.float() + torch.randn(shape, generator=generator) * 0.002).to(dtype) for _ in range(models - 1)
    ]


def models_of(tensors: dict[str, list[Tensor]]) -> dict[str, dict[str, Tensor]]:
    count = len(next(iter(tensors.values())))
    names = ["base", *(f"expert{number}" for number in range(count - 1))]
    return {name: {key: each[number] for key, each in tensors.items()} for number, name in enumerate(names)}


def stack_of(versions: list[Tensor], transposed: bool, **more: list[Tensor]) -> MemoryStorage:
    return MemoryStorage(models_of({STACK: versions, **more}), STACKED_CONFIG[transposed])


def plan_of(storage: MemoryStorage, rule: dict[str, object], *, device: bool = False, slot_bytes: int = 0) -> Plan:
    more = {"out_dtype": "float32", **{key: value for key, value in rule.items() if key != "merge_method"}}
    return planned(storage, str(rule["merge_method"]), slot_bytes=slot_bytes,
                   device_bytes=1 << 30 if device else None, **more)  # fmt: skip


def alone(versions: list[Tensor], transposed: bool, rule: dict[str, object], *, device: bool = False) -> Tensor:
    """Every matrix of a stack merged from models that store it as a tensor of its own, stacked again."""
    names = [ALONE[transposed].format(number) for number in range(len(versions[0]))]
    tensors = {name: [version[number] for version in versions] for number, name in enumerate(names)}
    storage = MemoryStorage(models_of(tensors), ALONE_CONFIG[transposed])
    plan = plan_of(storage, rule, device=device)
    assert {step.method for step in plan.steps} == {rule["merge_method"]}
    found = streamed_tensors(plan, storage)
    return torch.stack([found[name] for name in names])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@SIDES
@DEVICES
def test_a_stack_is_merged_as_each_of_its_matrices_by_itself(rule, transposed, device):
    versions = drawn((5, 24, 40))
    storage = stack_of(versions, transposed)
    expected = alone(versions, transposed, rule, device=device)
    # a row of one matrix at a time, some rows, a whole matrix and more
    for slot_bytes in (192, 1024, 1 << 20):
        plan = plan_of(storage, rule, device=device, slot_bytes=slot_bytes)
        assert [(step.method, step.matrices) for step in plan.steps] == [(rule["merge_method"], 5)]
        assert torch.equal(streamed_tensors(plan, storage)[STACK], expected)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from(["actmat", "mean", "backwards", "asks_twice"]),
    st.integers(1, 3),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([64, 256, 4096]),
    st.booleans(),
    st.booleans(),
)
def test_stacks_of_every_shape_are_merged_matrix_by_matrix(
    shape, method, experts, dtype, slot_bytes, transposed, device
):
    versions = drawn(shape, 1 + experts, dtype)
    storage, rule = stack_of(versions, transposed), {"merge_method": method}
    plan = plan_of(storage, rule, device=device, slot_bytes=slot_bytes)
    found = streamed_tensors(plan, storage)[STACK]
    assert torch.equal(found, alone(versions, transposed, rule, device=device))


@SIDES
def test_a_stack_agrees_with_the_formula_in_float64(transposed):
    versions = drawn((3, 24, 16))
    rule = {"merge_method": "actmat", "parameters": {"solver": "exact"}}
    storage = stack_of(versions, transposed)
    found = merged_in_memory(plan_of(storage, rule), storage)[STACK].double()
    for number in range(3):
        base, *experts = (v[number].double().T if transposed else v[number].double() for v in versions)
        changes = [expert - base for expert in experts]
        covariances = [change.T @ change for change in changes]
        right = sum(d @ c for d, c in zip(changes, covariances, strict=True))
        expected = right @ torch.linalg.inv(sum(covariances))
        change = (found[number].T if transposed else found[number]) - base
        assert float((change - expected).norm() / expected.norm()) < 1e-3


# interrupted, derived, checked


def folders_of(tmp_path: Path) -> dict[str, Path]:
    """A small model on disk of two stacks, a router and a norm, and three experts of it."""
    tensors = {
        STACK: drawn((4, 16, 24)),
        "model.layers.0.mlp.experts.down_proj": drawn((4, 24, 8), seed=1),
        "model.layers.0.mlp.gate.weight": drawn((4, 24), seed=2),
        "model.norm.weight": drawn((24,), seed=3),
    }
    folders = {}
    for name, model in models_of(tensors).items():
        folders[name] = save_model(tmp_path / name, model)
        (folders[name] / "config.json").write_text(json.dumps(STACKED_CONFIG[False]))
    return folders


def test_a_merge_of_stacks_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "LARGEST_SLOT_BYTES", memory.LARGEST_SLOT_BYTES)
    monkeypatch.setattr(write, "GROUP_BYTES", write.GROUP_BYTES)
    crashing.small_pieces()
    recipe = recipe_of(folders_of(tmp_path), "actmat")
    streammerge.merge(recipe, tmp_path / "whole", max_shard_size=crashing.SHARD_BYTES)
    whole = digests(tmp_path / "whole")
    resumed = 0
    for moment in (12, 20, 28, 36, 44, 52):
        out = tmp_path / f"at{moment}"
        assert crashing.dies(recipe, out, moment)
        if not out.exists():
            report = streammerge.merge(recipe, out, resume=True, max_shard_size=crashing.SHARD_BYTES)
            resumed += 0 < report.resumed_tensors < 4
        found = digests(out)
        found.pop(write.JOURNAL, None)
        assert found == whole
    assert resumed


@DEVICES
def test_what_is_finished_is_not_merged_again(device):
    storage = stack_of(drawn((3, 8, 16)), False, **{"model.layers.0.mlp.gate.weight": drawn((3, 16))})
    plan = plan_of(storage, RULES["ridge"], device=device)
    whole, _ = streamed(engine(plan)(plan, storage))
    rest, _ = streamed(engine(plan)(plan, storage, skip={"model.layers.0.mlp.gate.weight"}))
    assert rest == {STACK: whole[STACK]}


@pytest.mark.parametrize("method", ["actmat", "tsv", "wudi", "dare_linear"])
def test_stacks_are_what_a_merge_in_float64_gives(method, tmp_path):
    streammerge.merge(recipe_of(folders_of(tmp_path), method), tmp_path / "out")
    found = streammerge.verify(tmp_path / "out", inputs=True, recompute=10)
    assert (found.problems, found.unchecked) == ((), ())
    assert {each.name for each in found.recomputed if each.kind == "stack"} == {
        STACK, "model.layers.0.mlp.experts.down_proj",
    }  # fmt: skip


@DEVICES
@pytest.mark.parametrize("method", ["actmat", "asks_twice"])
def test_stacks_that_are_derived_merge_to_what_stored_ones_would(method, device, monkeypatch):
    versions = drawn((3, 16, 8), dtype=torch.float32)
    meant = stack_of(versions, False)
    stored = stack_of([versions[0], versions[1] / 2, *versions[2:]], False)
    rule: dict[str, object] = {"merge_method": method}
    expected = streamed_tensors(plan_of(meant, rule, device=device), meant)

    def view(model: Checkpoint) -> Checkpoint:
        if model.location != "expert0":
            return model
        return replace(model, tensors={name: scaled(scaled(e, 0.5), 4.0) for name, e in model.tensors.items()})

    before = plan_of(stored, rule)
    monkeypatch.setattr(model_views, "VIEWS", (view,))
    for slot_bytes in (64, 1 << 20):
        plan = plan_of(stored, rule, device=device, slot_bytes=slot_bytes)
        assert torch.equal(streamed_tensors(plan, stored)[STACK], expected[STACK])
    assert plan.read_bytes == before.read_bytes
    assert plan_of(stored, rule).memory.reserve_bytes > before.memory.reserve_bytes


# the plan


def test_the_memory_of_a_stack_is_that_of_one_matrix():
    rule = RULES["ridge"]
    few, many = (plan_of(stack_of(drawn((count, 48, 64)), False), rule, slot_bytes=1024).steps[0] for count in (2, 12))
    assert step_workspace_bytes(few, 1024) == step_workspace_bytes(many, 1024)
    assert step_device_bytes(few, 1024) == step_device_bytes(many, 1024)
    assert (6 * few.flops, 6 * few.read_bytes, few.passes) == (many.flops, many.read_bytes, many.passes)
    (one,) = plan_of(MemoryStorage(models_of({ALONE[False].format(0): drawn((48, 64))})), rule, slot_bytes=1024).steps
    assert step_workspace_bytes(few, 1024) == step_workspace_bytes(one, 1024)
    assert step_device_bytes(few, 1024) == step_device_bytes(one, 1024)
    assert few.flops == 2 * one.flops


@SIDES
def test_a_merge_of_a_stack_keeps_to_its_plan(transposed):
    storage = stack_of(drawn((6, 40, 56)), transposed)
    for rule in (RULES["ridge"], RULES["tsv"]):
        plan = plan_of(storage, rule, slot_bytes=1024)
        with Stream(plan, storage) as stream:
            for block in stream:
                block.release()
            facts = stream.memory_facts()
            assert stream.ahead.read_bytes == stream.to_read_bytes
        assert facts["workspace_overdraft"] == 0
        assert facts["workspace_used"] <= facts["workspace_planned"]


def test_a_stack_is_read_matrix_by_matrix_in_the_order_of_its_bytes():
    storage = stack_of(drawn((3, 8, 16)), False)
    streamed_tensors(plan_of(storage, RULES["ridge"]), storage)
    fetched = storage.noted("fetch")
    nbytes = 8 * 16 * 2
    start = min(offset for _, location, offset, _ in fetched if location == "base")
    read = [(location, (offset - start) // nbytes) for _, location, offset, _ in fetched]
    experts = ["expert0", "expert1", "expert2"]
    passes = plan_of(storage, RULES["ridge"]).steps[0].passes
    assert read == [(name, matrix) for matrix in range(3) for name in ["base", *experts * passes]]


@pytest.mark.parametrize("method", ["actmat", "tsv", "linear"])
def test_stacks_and_routers_go_by_the_recipes_method(method):
    router = "model.layers.0.mlp.gate.weight"
    storage = stack_of(drawn((3, 8, 16)), False, **{router: drawn((3, 16)), "model.norm.weight": drawn((16,))})
    plan = plan_of(storage, {"merge_method": method})
    assert {step.name: step.method for step in plan.steps} == {
        STACK: method, router: method, "model.norm.weight": "linear",
    }  # fmt: skip
    assert plan.warnings == ()


@DEVICES
def test_a_rule_sends_a_stack_to_a_method_of_matrices(device):
    versions = drawn((4, 8, 16))
    storage = stack_of(versions, False, **{"model.norm.weight": drawn((16,))})
    rule: dict[str, object] = {"merge_method": "linear", "rules": [{"match": "experts", "merge_method": "actmat"}]}
    plan = plan_of(storage, rule, device=device)
    assert [(step.method, step.matrices) for step in plan.steps if step.name == STACK] == [("actmat", 4)]
    assert torch.equal(
        streamed_tensors(plan, storage)[STACK], alone(versions, False, {"merge_method": "actmat"}, device=device)
    )


def test_other_tensors_of_three_dimensions_are_refused_by_such_a_rule():
    storage = MemoryStorage(models_of({"model.conv1.weight": drawn((4, 8, 16))}))
    with pytest.raises(PlanError, match=r"`model\.conv1\.weight` to `actmat`, but its shape \[4, 8, 16\] is not"):
        plan_of(storage, {"merge_method": "linear", "rules": [{"match": "conv", "merge_method": "actmat"}]})


def test_stacks_pool_with_nothing():
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    versions = drawn((2, 8, 16))
    storage = stack_of(versions, False, **{name: drawn((8, 16), seed=5) for name in names})
    rule: dict[str, object] = {"merge_method": "actmat", "parameters": {"pool": "inputs"}}
    plan = plan_of(storage, rule)
    pools = {step.name: step.pool for step in plan.steps}
    assert pools[STACK] is None
    assert pools[names[0]] == pools[names[1]] is not None
    assert torch.equal(streamed_tensors(plan, storage)[STACK], alone(versions, False, {"merge_method": "actmat"}))


# what is told of it


@SIDES
@DEVICES
def test_a_nan_is_named_with_the_matrix_that_holds_it(device, transposed):
    for model, number in (("expert1", 2), ("base", 0)):
        versions = drawn((4, 6, 8))
        versions[number][3, 2, 5] = math.nan
        storage = stack_of(versions, transposed)
        with pytest.raises(MergeError, match=rf"`{STACK}` in `{model}` holds NaN at \[3, 2, 5\]"):
            streamed_tensors(plan_of(storage, RULES["ridge"], device=device, slot_bytes=64), storage)


@DEVICES
def test_the_outcome_of_a_stack_is_that_of_all_its_matrices(device):
    versions = drawn((3, 12, 8))
    # in one matrix only one expert moved, so that there is nothing to solve
    for expert in versions[2:]:
        expert[1] = versions[0][1]
    storage = stack_of(versions, False)
    plan = plan_of(storage, RULES["ridge"], device=device)
    data, outcomes = streamed(engine(plan)(plan, storage))
    found, outcome = tensor_of(data[STACK], "F32", (3, 12, 8)), outcomes[STACK]
    base, *experts = (version.double() for version in versions)
    norms = [float((expert - base).norm()) for expert in experts]
    size = float((found.double() - base).norm())
    assert outcome.norm_ratio == pytest.approx(size / (sum(norms) / 3), rel=1e-5)
    assert outcome.growth == pytest.approx(size / max(norms), rel=1e-5)
    assert outcome.changed == pytest.approx(float((found.double() != base).double().mean()))

    facts: Facts = {}
    for number in range(3):
        one = stack_of([version[number : number + 1] for version in versions], False)
        single = plan_of(one, RULES["ridge"], device=device)
        add_facts(facts, streamed(engine(single)(single, one))[1][STACK].facts)
    assert outcome.facts == facts
    assert float(outcome.facts["certificate"]) > 0.0


def test_facts_keep_the_largest_number_every_text_and_whether_anything_was_true():
    facts: Facts = {}
    noted: list[Facts] = [
        {"solver": "ridge", "certificate": 1e-7, "filtered": False},
        {"solver": "none", "certificate": 3e-6, "filtered": True, "escalation": "float64, spectrum cut"},
        {"solver": "ridge", "certificate": 2e-7, "filtered": False, "kept_rank": 4},
    ]
    for each in noted:
        add_facts(facts, each)
    assert facts == {
        "solver": "none; ridge", "certificate": 3e-6, "filtered": True,
        "escalation": "float64, spectrum cut", "kept_rank": 4,
    }  # fmt: skip
    backwards: Facts = {}
    for each in reversed(noted):
        add_facts(backwards, each)
    assert backwards == facts


@pytest.mark.parametrize("method", ["knots", "svc", "larv"])
def test_rules_that_draw_draw_for_each_matrix_by_itself(method):
    """Equal matrices of one stack: drops that went by the tensor's name alone would be the same in all."""
    one = drawn((1, 12, 16))
    versions = [version.repeat(3, 1, 1) for version in one]
    rule = {"merge_method": method, "parameters": {"rule": "dare_linear", "rule_parameters": {"density": 0.5}}}
    storage = stack_of(versions, False)
    first, second, third = streamed_tensors(plan_of(storage, rule), storage)[STACK]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    cut = plan_of(storage, rule, slot_bytes=64)
    assert torch.equal(streamed_tensors(cut, storage)[STACK], torch.stack([first, second, third]))


@DEVICES
def test_stochastic_rounding_draws_by_the_place_in_the_whole_stack(device):
    versions = [version.repeat(2, 1, 1) for version in drawn((1, 16, 32))]
    storage, rule = stack_of(versions, False), {"merge_method": "actmat"}

    def rounded(slot_bytes: int, rounding: str) -> Tensor:
        more = {**rule, "out_dtype": "bfloat16", "rounding": rounding}
        plan = plan_of(storage, more, device=device, slot_bytes=slot_bytes)
        return streamed_tensors(plan, storage)[STACK]

    first, second = rounded(1 << 20, "stochastic")
    assert not torch.equal(first, second)
    assert torch.equal(torch.stack([first, second]), rounded(128, "stochastic"))
    assert torch.equal(*rounded(1 << 20, "nearest"))


def test_covariances_beside_a_stack_are_one_for_each_matrix():
    versions = drawn((3, 8, 6))
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn((3, 20, 6), generator=generator) for _ in range(3)]
    covariances = [each.mT @ each for each in inputs]
    models = models_of({STACK: versions})
    models |= {f"data{number}": {STACK: each} for number, each in enumerate(covariances)}
    storage = MemoryStorage(models, STACKED_CONFIG[False])

    def plan() -> Plan:
        recipe = {
            "merge_method": "regmean",
            "models": [{"model": f"expert{i}", "covariance": f"data{i}"} for i in range(3)],
            "parameters": {"reduce": 1.0},
            "out_dtype": "float32",
        }
        return make_plan(Recipe.from_dict(recipe), storage, memory_bytes=1 << 30)

    found = merged_in_memory(plan(), storage)[STACK].double()
    for number in range(3):
        weights = [version[number].double() for version in versions[1:]]
        terms = [each[number].double() for each in covariances]
        expected = sum(w @ c for w, c in zip(weights, terms, strict=True)) @ torch.linalg.inv(sum(terms))
        assert float((found[number] - expected).norm() / expected.norm()) < 1e-5
    storage.contents["data1"] = MemoryStorage({"data1": {STACK: covariances[1][0]}}).contents["data1"]
    with pytest.raises(PlanError, match=r"expected floats \[3, 6, 6\]"):
        plan()
