"""Numbers that a person should look at: large changes are told, NaN and infinities refused or counted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import streammerge
from streammerge import methods
from streammerge.errors import MergeError, RecipeError
from streammerge.outcome import Outcome
from streammerge.recipe import Recipe
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.stored import MemoryStorage, streamed, tensor_of, tensors_of
from tests.test_device_stream import engine, planned
from tests.test_every_method import plan_for, storage_for
from tests.test_report import report

# large changes


def grown(method: str, growth: float | None, experts: int) -> tuple[str, ...]:
    return streammerge.Report.warnings.fget(  # type: ignore[attr-defined]
        report_of(experts, Outcome("a", method, growth=growth))
    )


def report_of(experts: int, *outcomes: Outcome) -> streammerge.Report:
    made = report(*outcomes)
    object.__setattr__(made, "experts", experts)
    return made


@pytest.mark.parametrize(
    ("method", "experts", "fine", "large"),
    [
        ("linear", 8, 2.9, 3.1),
        ("actmat", 8, 2.9, 3.1),
        ("task_arithmetic", 2, 2.9, 3.1),
        ("task_arithmetic", 8, 7.9, 8.1),
        ("tsv", 8, 7.9, 8.1),
        ("dare_linear", 3, 9.4, 9.6),
    ],
)
def test_a_change_is_large_above_its_rules_bound(method, experts, fine, large):
    assert grown(method, fine, experts) == ()
    assert grown(method, None, experts) == ()
    assert len(grown(method, large, experts)) == 1


def test_every_rule_that_has_a_bound_of_its_own_exists():
    from streammerge.report import _DROPS, _SUMS

    assert set(methods.names()) >= _SUMS | _DROPS


def test_the_largest_changes_are_named_and_counted():
    outcomes = [Outcome(f"t{i}", "actmat", {"certificate": 1e-6}, growth=float(i)) for i in range(8)]
    found = report_of(3, *outcomes)
    line = (
        "4 tensors changed more than 3 times as much as in any expert: `t7` (7.0, actmat), `t6` (6.0, actmat), "
        "`t5` (5.0, actmat), …; smaller weights or a larger `ridge` hold them back"
    )
    assert found.warnings == (line,)
    assert found.to_dict()["warnings"] == [line]
    assert found.summary().splitlines()[1:] == [
        "least certain solve: `t0`, estimated relative error 1.0e-06",
        f"warning: {line}",
    ]


def test_a_merge_tells_of_its_large_changes(family, tmp_path):
    recipe = recipe_of(family, "task_arithmetic", parameters={"weight": 10.0})
    found = streammerge.merge(recipe, tmp_path / "out")
    assert len(found.large) == 19
    assert "19 tensors changed more than 3 times as much as in any expert" in found.summary()
    table = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    assert table["warnings"] == list(found.warnings)
    told = {tensor["name"]: tensor["growth"] for tensor in table["tensors"]}
    base, merged = tensors_of(family["base"]), tensors_of(tmp_path / "out")
    experts = [tensors_of(folder) for name, folder in family.items() if name != "base"]
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        longest = max(float((each[name].double() - base[name].double()).norm()) for each in experts)
        change = float((merged[name].double() - base[name].double()).norm())
        assert told[name] == pytest.approx(change / longest, rel=0.01)


def test_a_single_expert_that_changed_a_tensor_is_no_large_change(tmp_path):
    base = llama_tensors()
    folders = {"base": save_model(tmp_path / "base", base), "tuned": save_model(tmp_path / "tuned", tuned(base, 1))}
    folders |= {f"same{i}": save_model(tmp_path / f"same{i}", base) for i in range(7)}
    found = streammerge.merge(recipe_of(folders, "actmat"), tmp_path / "out")
    # the mean of the experts' norms is an eighth
    assert max(each.norm_ratio or 0.0 for each in found.tensors) > 7
    assert found.warnings == ()


@pytest.mark.parametrize("method", methods.names())
def test_no_method_is_warned_of_by_its_defaults(method):
    storage = storage_for(method)
    plan = plan_for(method, storage, device_bytes=None)
    _, outcomes = streamed(engine(plan)(plan, storage))
    assert report_of(len(plan.recipe.experts), *outcomes.values()).warnings == ()


# NaN and infinities

BAD = "model.layers.0.mlp.up_proj.weight"


def damaged(value: float, name: str = BAD) -> MemoryStorage:
    base = llama_tensors()
    experts = [tuned(base, seed) for seed in (1, 2)]
    experts[1][name].view(-1)[5] = value
    return MemoryStorage({"base": base, "e0": experts[0], "e1": experts[1]})


both_engines = pytest.mark.parametrize("device_bytes", [None, 1 << 30], ids=["stream", "device"])


@both_engines
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_pass_lets_an_experts_value_through_and_counts_it(method, value, device_bytes):
    storage = damaged(value)
    plan = planned(storage, method, device_bytes=device_bytes, non_finite="pass")
    data, outcomes = streamed(engine(plan)(plan, storage))
    step = next(step for step in plan.steps if step.name == BAD)
    found = tensor_of(data[BAD], step.dtype, step.shape)
    bad = ~torch.isfinite(found).view(-1)
    assert bad.nonzero().tolist() == [[5]]
    assert {name: o.non_finite for name, o in outcomes.items() if o.non_finite} == {BAD: 1}
    # norms of what is not finite are no numbers, and JSON has no word for them
    assert outcomes[BAD].norm_ratio is None
    plain = planned(storage, method, device_bytes=device_bytes)
    with pytest.raises(MergeError, match=f"`{BAD}` in `e1` holds "):
        streamed(engine(plain)(plain, storage))


@both_engines
@pytest.mark.parametrize("method", methods.names())
def test_pass_ends_in_a_value_that_is_counted_or_in_a_refusal(method, device_bytes):
    storage = storage_for(method)
    last = [name for name in storage.contents if name.startswith("expert")][-1]
    changed = tuned(llama_tensors(), 8)
    changed[BAD].view(-1)[5] = math.nan
    storage.contents[last] = MemoryStorage({last: changed}).contents[last]
    plan = plan_for(method, storage, device_bytes=device_bytes, non_finite="pass")
    step = next(step for step in plan.steps if step.name == BAD)
    if step.element_by_element:
        data, outcomes = streamed(engine(plan)(plan, storage))
        found = tensor_of(data[BAD], step.dtype, step.shape)
        assert outcomes[BAD].non_finite == int((~torch.isfinite(found)).sum())
        # a method that leaves the value out, as `ram` does NaN, is told of too
        assert {name: o.non_finite_inputs for name, o in outcomes.items() if o.non_finite_inputs} == {BAD: 1}
        return
    with pytest.raises(MergeError, match=f"`{BAD}` in `{last}` holds NaN at") as caught:
        streamed(engine(plan)(plan, storage))
    assert caught.value.hint == (
        f"`{method}` needs the whole tensor, and `non_finite: pass` is for methods that merge each element by itself: "
        "choose one, such as `linear`, by a rule that matches this name."
    )


@both_engines
def test_a_rule_takes_a_damaged_matrix_from_a_method_that_cannot_have_it(device_bytes):
    storage = damaged(math.nan)
    rules = [{"match": "0.mlp.up_proj", "merge_method": "linear"}]
    plan = planned(storage, "actmat", device_bytes=device_bytes, non_finite="pass", rules=rules)
    _, outcomes = streamed(engine(plan)(plan, storage))
    assert {name: o.non_finite for name, o in outcomes.items() if o.non_finite} == {BAD: 1}


@both_engines
@pytest.mark.parametrize("method", ["task_arithmetic", "actmat"])
def test_pass_lets_through_what_the_outputs_dtype_cannot_hold(method, device_bytes):
    base = {"model.layers.0.mlp.up_proj.weight": torch.full((8, 8), 60_000.0), "h.0.attn.bias": torch.full((3,), 1e5)}
    expert = {name: tensor + 8_000 * torch.eye(*tensor.shape) if tensor.ndim == 2 else tensor.clone()
              for name, tensor in base.items()}  # fmt: skip
    storage = MemoryStorage({"base": base, "e0": expert})
    plan = planned(storage, method, device_bytes=device_bytes, non_finite="pass", out_dtype="float16")
    data, outcomes = streamed(engine(plan)(plan, storage))
    assert {name: o.non_finite for name, o in outcomes.items()} == {BAD: 8, "h.0.attn.bias": 3}
    assert tensor_of(data[BAD], "F16", (8, 8)).isinf().equal(torch.eye(8).bool())
    plain = planned(storage, method, device_bytes=device_bytes, out_dtype="float16")
    with pytest.raises(MergeError, match="leaves the range of F16"):
        streamed(engine(plain)(plain, storage))


def test_what_passed_is_in_report_and_summary_and_verified(family: dict[str, Path], tmp_path: Path):
    tensors = tensors_of(family["math"])
    tensors["lm_head.weight"][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    family["math"] = save_model(tmp_path / "diverged", tensors)
    found = streammerge.merge(recipe_of(family, "linear", non_finite="pass"), tmp_path / "out")
    line = "`non_finite: pass` let NaN or infinite values into 1 tensor: `lm_head.weight` (3 in, 3 out)"
    assert found.warnings == (line,)
    assert f"warning: {line}" in found.summary()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    table = json.loads((tmp_path / "out" / "streammerge.json").read_text(), parse_constant=refuse)
    for key in ("non_finite", "non_finite_inputs"):
        assert {t["name"]: t[key] for t in table["tensors"] if t[key]} == {"lm_head.weight": 3}
    assert table["recipe"]["non_finite"] == "pass"
    verified = streammerge.verify(tmp_path / "out", recompute=20)
    assert verified.problems == ()
    assert len(verified.recomputed) == 20


def test_non_finite_is_refuse_or_pass(family):
    assert Recipe.from_dict(recipe_of(family, "linear")).non_finite == "refuse"
    passing = Recipe.from_dict(recipe_of(family, "linear", non_finite="pass"))
    assert passing.non_finite == "pass"
    assert Recipe.from_dict(passing.to_dict()) == passing
    assert "non_finite" not in Recipe.from_dict(recipe_of(family, "linear", non_finite="refuse")).to_dict()
    with pytest.raises(RecipeError, match="`non_finite` is the text `keep`, expected `refuse` or `pass`"):
        Recipe.from_dict(recipe_of(family, "linear", non_finite="keep"))
