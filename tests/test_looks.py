"""Methods that must know a whole tensor, or the whole model, before its first block is merged."""

from __future__ import annotations

import json

import pytest
import torch

from streammerge import memory, methods
from streammerge.device_stream import DeviceStream
from streammerge.errors import MergeError, PlanError, RecipeError
from streammerge.methods import describe
from streammerge.plan import make_plan
from streammerge.recipe import Recipe
from streammerge.stream import Stream
from tests import looking_methods
from tests.models import llama_tensors, tuned
from tests.stored import MemoryStorage, streamed, tensor_of

EXPERTS = 3


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    for name in looking_methods.NAMES:
        monkeypatch.setitem(methods.METHODS, name, "tests.looking_methods")


def family(**more):
    base = llama_tensors()
    models = {"base": base, **{f"expert{i}": tuned(base, i + 1) for i in range(EXPERTS)}}
    return MemoryStorage(models | more)


def planned(storage, method, *, slot_bytes=0, input_slots=None, device=False, **more):
    experts = [{"model": f"expert{i}", **more.pop(f"expert{i}", {})} for i in range(EXPERTS)]
    recipe = Recipe.from_dict({"merge_method": method, "base_model": "base", "models": experts, **more})
    with pytest.MonkeyPatch.context() as patch:
        if slot_bytes:
            patch.setattr(memory, "STAGED_SLOT_BYTES", slot_bytes)
            patch.setattr(memory, "LARGEST_SLOT_BYTES", slot_bytes)
        if input_slots:
            patch.setattr(memory, "MOST_INPUT_SLOTS", input_slots)
        return make_plan(recipe, storage, memory_bytes=1 << 30, device_memory_bytes=1 << 30 if device else None)


def merged(plan, storage, skip=()):
    engine = Stream if plan.device_memory is None else DeviceStream
    stream = engine(plan, storage, skip=set(skip))
    data, outcomes = streamed(stream)
    assert stream.ahead.read_bytes == stream.to_read_bytes
    return data, outcomes


def counted(names):
    """What the counts must be, over these tensors."""
    models = family_tensors()
    changes = [expert[n].float() - models[0][n].float() for n in names for expert in models[1:]]
    grown, elements = sum(int((c > 0).sum()) for c in changes), sum(c.numel() for c in changes)
    small = sum(int(((c > 0) & (c < 0.002 * grown / elements)).sum()) for c in changes)
    return elements, small


def family_tensors():
    base = llama_tensors()
    return [base, *(tuned(base, i + 1) for i in range(EXPERTS))]


POOLED = {"parameters": {"pool": "inputs"}}
at_model = pytest.mark.parametrize(
    ("method", "more"),
    [("looks_at_model", {}), ("looks_at_matrices", {}), ("looks_at_matrices", POOLED)],
    ids=["elements", "matrices", "pooled"],
)
on_either = pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])


@on_either
def test_a_look_sees_every_element_once_a_pass(device):
    storage = family()
    _, outcomes = merged(planned(storage, "looks_twice", slot_bytes=256, device=device), storage)
    for name, outcome in outcomes.items():
        if outcome.method != "copy":
            assert (outcome.facts["elements"], outcome.facts["small"]) == counted([name])


@on_either
@at_model
def test_a_look_at_the_model_sees_every_element_of_its_tensors_once_a_pass(method, more, device):
    storage = family()
    _, outcomes = merged(planned(storage, method, slot_bytes=256, device=device, **more), storage)
    looking = {name: outcome.facts for name, outcome in outcomes.items() if outcome.method == method}
    assert len(looking) == (19 if method == "looks_at_model" else 14)
    assert {(facts["elements"], facts["small"]) for facts in looking.values()} == {counted(looking)}


@pytest.mark.parametrize(
    ("method", "more"),
    [("looks_twice", {}), ("looks_at_model", {}), ("looks_at_matrices", {}), ("looks_at_matrices", POOLED),
     ("by_rows", {})],
)  # fmt: skip
def test_the_bytes_depend_neither_on_slots_nor_on_what_is_held_nor_on_the_engine(method, more):
    storage = family()
    ways = [{"slot_bytes": size, "device": device} for size in (128, 512, 4 << 20) for device in (False, True)]
    ways += [{"slot_bytes": 128, "input_slots": slots} for slots in (8, 16, 64)]
    first, *others = (merged(planned(storage, method, **way, **more), storage)[0] for way in ways)
    assert all(other == first for other in others)


@pytest.mark.parametrize("input_slots", [8, 256], ids=["read_again", "held"])
def test_a_look_reads_again_only_what_the_slots_cannot_hold(input_slots):
    storage = family()
    plan = planned(storage, "looks_twice", slot_bytes=256, input_slots=input_slots)
    merged(plan, storage)
    fetched = storage.noted("fetch")
    held = [step for step in plan.steps if memory.is_held(step, 256, plan.memory.input_slots)]
    again = [step for step in plan.steps if step.looks and step not in held]
    assert (not again) == (input_slots == 256)
    assert sum(nbytes for *_, nbytes in fetched) == plan.read_bytes + 2 * sum(step.read_bytes for step in again)
    # what is read again later stays in the page cache until then
    assert len(storage.noted("release")) == len(set(fetched))


@on_either
@at_model
def test_a_look_at_the_model_reads_its_tensors_once_a_pass(method, more, device):
    storage = family()
    plan = planned(storage, method, slot_bytes=256, device=device, **more)
    merged(plan, storage)
    fetched = storage.noted("fetch")
    looks = 2 * sum(step.read_bytes for step in plan.steps if step.looks_at_model)
    assert sum(nbytes for *_, nbytes in fetched) == plan.read_bytes + looks
    # what is read again later stays in the page cache until then; a device's last copy may be on its way at the end
    released = storage.noted("release")
    assert len(set(fetched)) - device <= len(released) == len(set(released))


@on_either
@at_model
def test_a_look_at_the_model_also_sees_what_an_earlier_run_finished(method, more, device):
    storage = family()
    plan = planned(storage, method, slot_bytes=256, device=device, **more)
    whole, _ = merged(plan, storage)
    for count in (1, 5, len(whole) - 1):
        done = set(list(whole)[:count])
        rest, _ = merged(plan, storage, skip=done)
        assert rest == {name: data for name, data in whole.items() if name not in done}


@on_either
@at_model
def test_each_look_at_the_model_ends_after_its_own_passes(method, more, device):
    storage = family()
    # TIES takes a third look
    rules = [{"match": "down_proj", "merge_method": "ties", "parameters": {"density": 0.5, "trim": "model"}}]
    plan = planned(storage, method, device=device, rules=rules, **more)
    stream = (DeviceStream if device else Stream)(plan, storage)
    streamed(stream)
    assert set(stream._looks) == {method, "ties"}
    assert [number for number, name, _ in stream._looks[method].events if not name] == [0, 1]


@on_either
@at_model
def test_what_is_not_finite_is_refused_by_a_look_before_anything_is_merged(method, more, device):
    broken = tuned(llama_tensors(), 2)
    broken["model.layers.1.mlp.down_proj.weight"][3, 7] = torch.inf
    storage = family(expert1=broken)
    handed = []
    stream = (DeviceStream if device else Stream)(planned(storage, method, device=device, **more), storage)
    with stream, pytest.raises(MergeError, match=r"`model\.layers\.1\.mlp\.down_proj\.weight`.*`expert1`"):
        handed.extend(stream)
    assert not handed


@at_model
def test_a_look_that_does_not_fit_the_device_is_told_before_anything_is_merged(method, more, monkeypatch):
    def look(self, number, deltas):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(looking_methods.Counts, "look", look)
    storage = family()
    stream = DeviceStream(planned(storage, method, device=True, **more), storage)
    told = pytest.raises(MergeError, match=rf"does not fit on cpu: {method} was planned to take")
    with stream, told as caught:
        next(iter(stream))
    assert "--device-memory" in caught.value.hint


@pytest.mark.parametrize("method", ["looks_at_model", "looks_at_matrices"])
def test_nothing_is_looked_at_when_all_that_looks_is_finished(method):
    storage = family()
    plan = planned(storage, method, slot_bytes=256)
    done = {step.name for step in plan.steps if step.looks_at_model}
    merged(plan, storage, skip=done)
    assert sum(nbytes for *_, nbytes in storage.noted("fetch")) == sum(
        step.read_bytes for step in plan.steps if step.name not in done
    )


def test_in_memory_a_method_looks_too():
    from streammerge.delta import TensorDeltas

    base, *experts = (model["lm_head.weight"] for model in family_tensors())
    deltas = TensorDeltas(base, experts)
    describe("looks_twice").merge(deltas, scale=0.002)
    assert (deltas.facts["elements"], deltas.facts["small"]) == counted(["lm_head.weight"])
    assert deltas.seen.events[-1] == (1, "", -1)


def test_rows_come_whole():
    storage = family()
    plan = planned(storage, "by_rows", slot_bytes=96)
    assert plan.memory.slot_bytes >= 96
    data, _ = merged(plan, storage)
    base, *experts = (model["model.layers.0.mlp.down_proj.weight"].float() for model in family_tensors())
    wanted = base + sum(
        torch.where(e - base == (e - base).amax(dim=1, keepdim=True), e - base, torch.zeros(())) for e in experts
    )
    found = tensor_of(data["model.layers.0.mlp.down_proj.weight"], "BF16", tuple(base.shape))
    assert torch.equal(found, wanted.bfloat16())


def beside_of(model):
    return {name: t.float() for name, t in tuned(model, 9).items() if t.is_floating_point() and t.ndim == 2}


@pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])
def test_what_lies_beside_an_expert_comes_with_its_block(device):
    beside = beside_of(llama_tensors())
    storage = family(data=beside)
    names = {f"expert{i}": {"fisher": "data"} for i in range(EXPERTS)}
    data, _ = merged(
        planned(storage, "adds_beside", slot_bytes=256, device=device, out_dtype="float32", **names), storage
    )
    base = llama_tensors()
    for name in ("lm_head.weight", "model.norm.weight"):
        wanted = base[name].float() + 3 * beside.get(name, torch.zeros(()))
        assert torch.allclose(tensor_of(data[name], "F32", tuple(base[name].shape)), wanted, rtol=1e-6)


def test_a_method_that_needs_data_beside_its_experts_says_which():
    with pytest.raises(RecipeError, match="`fisher` is missing"):
        planned(family(), "adds_beside")
    with pytest.raises(RecipeError, match="unknown key `fisher`"):
        planned(family(), "linear", expert0={"fisher": "data"})


def test_data_of_another_shape_is_refused():
    beside = beside_of(llama_tensors())
    beside["lm_head.weight"] = torch.zeros(3, 3)
    names = {f"expert{i}": {"fisher": "data"} for i in range(EXPERTS)}
    with pytest.raises(
        PlanError, match=r"`lm_head.weight` is F32 \[3, 3\] in `data`, expected floats \[64, 16\]: the fisher"
    ):
        planned(family(data=beside), "adds_beside", **names)


def test_a_recipe_with_data_is_the_same_after_writing_it_down():
    names = {f"expert{i}": {"fisher": "data"} for i in range(EXPERTS)}
    recipe = planned(family(data=beside_of(llama_tensors())), "adds_beside", **names).recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
