"""The engine for accelerators, run on the CPU: every byte in order, within its budget, whatever goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammerge import device_memory, device_stream, memory, methods
from streammerge.device_deltas import DeviceDeltas
from streammerge.device_stream import DeviceStream
from streammerge.errors import MergeError, PlanError
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from streammerge.stream import Stream
from tests import memory_hungry, odd_methods
from tests.models import llama_tensors, tuned
from tests.solve.changes import experts, relative_error, with_ridge
from tests.stored import MemoryStorage, streamed, streammerge_threads, tensor_of
from tests.test_stream import GPT2, families

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _leaves_no_thread() -> Iterator[None]:
    yield
    assert streammerge_threads() == []


@pytest.fixture(autouse=True)
def _odd_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in odd_methods.NAMES:
        monkeypatch.setitem(methods.METHODS, name, "tests.odd_methods")
    for name in memory_hungry.NAMES:
        monkeypatch.setitem(methods.METHODS, name, "tests.memory_hungry")
    for name, value in (("elements", 1 << 40), ("failing_tries", 0), ("seen", [])):
        monkeypatch.setattr(memory_hungry.Room, name, value)


def planned(
    storage: MemoryStorage, method: str, *, slot_bytes: int = 0, device_bytes: int | None = GIB, **more: object
) -> Plan:
    """A plan over all models of a storage, for the CPU as a device with memory of its own unless that is None."""
    names = list(storage.contents)
    recipe = {"merge_method": method, "models": [{"model": name} for name in names if name != "base"], **more}
    if "base" in names:
        recipe["base_model"] = "base"
    with pytest.MonkeyPatch.context() as patch:
        if slot_bytes:
            patch.setattr(memory, "STAGED_SLOT_BYTES", slot_bytes)
            patch.setattr(memory, "LARGEST_SLOT_BYTES", slot_bytes)
        return make_plan(Recipe.from_dict(recipe), storage, memory_bytes=GIB, device_memory_bytes=device_bytes)


def engine(plan: Plan) -> type[Stream] | type[DeviceStream]:
    return Stream if plan.device_memory is None else DeviceStream


def merged(plan: Plan, storage: MemoryStorage) -> dict[str, Tensor]:
    data, _ = streamed(engine(plan)(plan, storage))
    return {step.name: tensor_of(data[step.name], step.dtype, step.shape) for step in plan.steps}


def same_bytes(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def small_family(experts: int = 3, config: dict[str, object] | None = None) -> MemoryStorage:
    base = llama_tensors()
    models = {"base": base, **{f"expert{i}": tuned(base, i + 1) for i in range(experts)}}
    return MemoryStorage(models, config)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    families(),
    st.sampled_from(["linear", "task_arithmetic"]),
    st.sampled_from([None, "float32", "float16", "bfloat16"]),
    st.sampled_from([64, 192, 1024, 4 << 20]),
    st.sampled_from(["nearest", "stochastic"]),
    st.booleans(),
)
def test_methods_of_elements_give_the_same_bytes_as_on_the_cpu(
    models, method, out_dtype, slot_bytes, rounding, with_base
):
    if method == "linear" and not with_base:
        del models["base"]
    storage = MemoryStorage(models)
    more = {"rounding": rounding, **({"out_dtype": out_dtype} if out_dtype else {})}
    staged = merged(planned(storage, method, slot_bytes=slot_bytes, **more), storage)
    assert same_bytes(staged, merged(planned(storage, method, device_bytes=None, **more), storage))


def test_what_float32_experts_add_up_to_in_a_float64_output_is_summed_in_float64():
    # linear reads no base, whose dtype the output has
    base = {"layers.0.weight": torch.full((3,), 0.1, dtype=torch.float64)}
    models = {f"expert{i}": {"layers.0.weight": torch.tensor([1.0, 0.3, 1e-7]) * (i + 1) / 7} for i in range(3)}
    storage = MemoryStorage({"base": base, **models})
    staged = merged(planned(storage, "linear"), storage)
    assert same_bytes(staged, merged(planned(storage, "linear", device_bytes=None), storage))
    exact = sum(model["layers.0.weight"].double() for model in models.values()) / 3
    assert torch.allclose(staged["layers.0.weight"], exact, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize(
    "method", ["mean", "three_times", "backwards", "asks_twice", "leans_on_columns", "returns_a_view"]
)
@pytest.mark.parametrize("config", [None, GPT2], ids=["llama", "gpt2"])
def test_methods_of_matrices_give_the_same_bytes_as_on_the_cpu(method, config):
    storage = small_family(config=config)
    staged = merged(planned(storage, method, slot_bytes=128), storage)
    assert same_bytes(staged, merged(planned(storage, method, device_bytes=None), storage))


@pytest.mark.parametrize("shape", [(96, 160), (40, 200)], ids=["primal", "dual"])
def test_actmat_on_a_device_is_the_formula_in_float64(shape):
    base, changed = experts("sft", *shape, 3)
    name = "model.layers.0.self_attn.q_proj.weight"
    storage = MemoryStorage({"base": {name: base}, **{f"e{i}": {name: e} for i, e in enumerate(changed)}})
    plan = planned(storage, "actmat", slot_bytes=1024, out_dtype="float32")
    data, outcomes = streamed(DeviceStream(plan, storage))
    found = tensor_of(data[name], "F32", shape).double() - base.double()
    assert relative_error(found, with_ridge(base, changed, 0.1)) <= 2e-4
    norms = [float((e.double() - base.double()).norm()) for e in changed]
    assert outcomes[name].norm_ratio == pytest.approx(float(found.norm()) / (sum(norms) / 3), rel=1e-4)
    assert outcomes[name].facts["solver"] == "ridge"


def test_reports_are_those_of_the_cpu():
    storage = small_family()
    _, staged = streamed(DeviceStream(planned(storage, "task_arithmetic", slot_bytes=256), storage))
    _, plain = streamed(Stream(planned(storage, "task_arithmetic", device_bytes=None), storage))
    for name, outcome in plain.items():
        found = staged[name]
        assert (found.method, found.changed) == (outcome.method, outcome.changed)
        for fact in ("norm_ratio", "rounding_loss"):
            wanted = getattr(outcome, fact)
            assert getattr(found, fact) == (None if wanted is None else pytest.approx(wanted, rel=1e-5))


def test_each_byte_is_read_once_whatever_the_passes():
    storage = small_family()
    plan = planned(storage, "actmat", slot_bytes=128)
    assert any(step.passes == 2 for step in plan.steps)
    stream = DeviceStream(plan, storage)
    streamed(stream)
    fetched = storage.noted("fetch")
    assert len(set(fetched)) == len(fetched)
    assert stream.ahead.read_bytes == stream.to_read_bytes == plan.read_bytes


def test_the_fewest_slots_are_enough():
    storage = small_family(experts=5)
    plan = planned(storage, "actmat", slot_bytes=128)
    needed = memory._fewest_slots(plan.steps)
    tight = memory.MemoryPlan(
        budget_bytes=0, slot_bytes=128, input_slots=needed, output_slots=2, workspace_bytes=0, reserve_bytes=0
    )
    from dataclasses import replace

    assert same_bytes(merged(replace(plan, memory=tight), storage), merged(plan, storage))


def test_steps_wait_for_room_on_the_device(monkeypatch):
    storage = small_family()
    plan = planned(storage, "actmat", slot_bytes=1 << 20)
    largest = plan.device_memory.largest_step_bytes
    at_once = []
    stage = DeviceStream._stage

    def noting(self, task):
        stage(self, task)
        at_once.append(task)

    monkeypatch.setattr(DeviceStream, "_stage", noting)
    tight = planned(storage, "actmat", slot_bytes=1 << 20, device_bytes=largest)
    assert same_bytes(merged(tight, storage), merged(plan, storage))
    assert all(0 <= task.device_bytes <= largest for task in at_once)
    assert all(not task.runs and task.out is None for task in at_once)


def test_a_step_that_cannot_fit_the_device_is_refused_by_the_plan():
    storage = small_family()
    with pytest.raises(PlanError, match=r"the largest step needs .* of device memory, more than 1.0 KiB: `") as caught:
        planned(storage, "actmat", device_bytes=1024)
    assert caught.value.hint.startswith("Pass `--device-memory ")


def test_a_step_takes_its_inputs_its_workspace_and_its_result():
    plan = planned(small_family(), "actmat")
    for step in plan.steps:
        found = device_memory.step_device_bytes(step, plan.memory.slot_bytes)
        if step.by_matrix:
            assert found >= step.read_bytes + step.device_bytes + step.write_bytes
        assert found <= plan.device_memory.largest_step_bytes
        assert plan.workspace_bytes(step) == found


@pytest.mark.parametrize("method", ["wants_elements", "wants_matrix"])
def test_a_device_that_is_full_for_a_moment_changes_nothing(method, caplog):
    storage = small_family()
    plan = planned(storage, method, slot_bytes=512)
    whole = merged(plan, storage)
    memory_hungry.Room.failing_tries = 1
    assert same_bytes(merged(plan, storage), whole)
    assert "did not fit on cpu: trying again alone" in caplog.text


def test_a_block_that_does_not_fit_is_halved_until_it_does(monkeypatch, caplog):
    monkeypatch.setattr(device_stream, "_FEWEST_ELEMENTS", 16)
    storage = small_family()
    plan = planned(storage, "wants_elements", rounding="stochastic")
    whole = merged(plan, storage)
    memory_hungry.Room.elements = 100
    memory_hungry.Room.seen.clear()
    assert same_bytes(merged(plan, storage), whole)
    assert min(memory_hungry.Room.seen) <= 100 < max(memory_hungry.Room.seen)
    assert "in smaller pieces" in caplog.text


def test_a_matrix_that_does_not_fit_with_its_experts_reads_them_again_one_by_one(caplog):
    storage = small_family()
    plan = planned(storage, "wants_matrix", slot_bytes=128)
    whole = merged(plan, storage)
    memory_hungry.Room.elements = 1000
    storage.events.clear()
    assert same_bytes(merged(plan, storage), whole)
    assert "in smaller pieces" in caplog.text
    assert len(storage.noted("fetch")) > len(set(storage.noted("fetch")))


def test_actmat_gives_the_same_bytes_when_it_reads_experts_again(monkeypatch):
    storage = small_family()
    plan = planned(storage, "actmat", slot_bytes=128)
    whole = merged(plan, storage)
    look = DeviceDeltas.refuse_non_finite

    def fails_with_all_experts(self, names, first_element):
        if self.name.endswith("q_proj.weight") and not callable(self._moving):
            raise torch.OutOfMemoryError("device out of memory")
        look(self, names, first_element)

    monkeypatch.setattr(DeviceDeltas, "refuse_non_finite", fails_with_all_experts)
    assert same_bytes(merged(plan, storage), whole)


@pytest.mark.parametrize("method", ["wants_elements", "wants_matrix"])
def test_what_fits_in_no_way_is_refused_and_nothing_false_is_handed_over(method):
    storage = small_family()
    plan = planned(storage, method)
    memory_hungry.Room.elements = 0
    with pytest.raises(MergeError, match=r"` does not fit on cpu: \w+ was planned to take ") as caught:
        merged(plan, storage)
    assert "`--device cpu`" in caught.value.hint


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("model", ["base", "expert1"])
@pytest.mark.parametrize("method", ["task_arithmetic", "actmat"])
def test_a_value_that_is_not_finite_is_named(value, model, method):
    models = {"base": llama_tensors()}
    models |= {f"expert{i}": tuned(models["base"], i + 1) for i in range(3)}
    name = "model.layers.1.mlp.down_proj.weight"
    models[model][name][3, 5] = value
    storage = MemoryStorage(models)
    kind = "NaN" if math.isnan(value) else "an infinity"
    with pytest.raises(MergeError, match=rf"`{name}` in `{model}` holds {kind} at \[3, 5\]"):
        merged(planned(storage, method, slot_bytes=256), storage)


def test_an_overflowing_output_is_refused():
    models = {"base": {"w": torch.zeros(200)}, "e": {"w": torch.full((200,), 1e5)}}
    storage = MemoryStorage(models)
    with pytest.raises(MergeError, match="`w` merged by `linear` leaves the range of F16 in 200 elements"):
        merged(planned(storage, "linear", out_dtype="float16"), storage)


def test_a_bug_in_a_method_keeps_its_traceback_and_stops_every_thread():
    storage = small_family()
    with pytest.raises(ZeroDivisionError) as caught:
        merged(planned(storage, "raises"), storage)
    assert any("while merging `" in note for note in getattr(caught.value, "__notes__", ["while merging `"]))


def test_a_read_that_fails_is_raised_and_stops_every_thread():
    storage = small_family()
    plan = planned(storage, "actmat", slot_bytes=128)
    storage.fail_at = 40
    with pytest.raises(OSError, match="Input/output error"):
        merged(plan, storage)


def test_leaving_in_the_middle_stops_every_thread():
    storage = small_family()
    with DeviceStream(planned(storage, "actmat", slot_bytes=128), storage) as stream:
        next(iter(stream))


def test_what_an_earlier_run_finished_is_not_merged_again():
    storage = small_family()
    plan = planned(storage, "actmat", slot_bytes=128)
    whole, _ = streamed(DeviceStream(plan, storage))
    done = set(list(whole)[:7])
    rest, _ = streamed(DeviceStream(plan, storage, skip=done))
    assert rest == {name: data for name, data in whole.items() if name not in done}


def test_kept_and_integer_tensors_never_visit_the_device(monkeypatch):
    storage = small_family()
    plan = planned(storage, "task_arithmetic", rules=[{"match": "embed", "keep": "base"}], out_dtype="float32")
    staged = []
    stage = DeviceStream._stage
    monkeypatch.setattr(
        DeviceStream, "_stage", lambda self, task: (staged.append(task.shared.step.name), stage(self, task))
    )
    found = merged(plan, storage)
    assert torch.equal(found["model.embed_tokens.weight"], llama_tensors()["model.embed_tokens.weight"].float())
    assert not {"model.embed_tokens.weight", "model.position_ids"} & set(staged)
    assert set(staged) == {step.name for step in plan.steps if step.method != "copy"}
