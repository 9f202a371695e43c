"""The stream: every byte in order, the same for any budget, and no method can make it hang."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammerge
from streammerge import memory, methods, stream
from streammerge.checkpoint import load_checkpoint
from streammerge.errors import MergeError
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from streammerge.solve.cost import PANEL_ELEMENTS
from streammerge.storage.local import LocalStorage
from streammerge.stream import Stream, thread_limit
from streammerge.torch_dtypes import TORCH_DTYPES
from tests import odd_methods
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.stored import (
    MemoryStorage,
    digests,
    merged_in_memory,
    models_under,
    streamed,
    streammerge_threads,
    tensors_of,
)

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


@pytest.fixture(autouse=True)
def _leaves_no_thread() -> Iterator[None]:
    yield
    assert streammerge_threads() == []


@pytest.fixture(autouse=True)
def _odd_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in odd_methods.NAMES:
        monkeypatch.setitem(methods.METHODS, name, "tests.odd_methods")


def planned(storage: MemoryStorage, method: str, *, slot_bytes: int = 0, **more: object) -> Plan:
    """A plan over all models of a storage; `slot_bytes` is the most a slot has."""
    names = list(storage.contents)
    recipe = {"merge_method": method, "models": [{"model": name} for name in names if name != "base"], **more}
    if "base" in names:
        recipe["base_model"] = "base"
    with pytest.MonkeyPatch.context() as patch:
        if slot_bytes:
            patch.setattr(memory, "LARGEST_SLOT_BYTES", slot_bytes)
        return make_plan(Recipe.from_dict(recipe), storage, memory_bytes=1 << 30)


def small_family(method_dtype: torch.dtype = torch.bfloat16, experts: int = 3) -> MemoryStorage:
    base = llama_tensors(dtype=method_dtype)
    return MemoryStorage({"base": base, **{f"expert{i}": tuned(base, i + 1) for i in range(experts)}})


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


FLOATS = ("F64", "F32", "F16", "BF16")
SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 300)),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
)


@st.composite
def families(draw: st.DrawFn) -> dict[str, dict[str, Tensor]]:
    """A base and one to four experts: a few tensors, each model's in a dtype of its own."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-6, 1.0, 300.0]))
    models = {}
    for model in ("base", *(f"expert{i}" for i in range(draw(st.integers(1, 4))))):
        dtypes = draw(st.lists(st.sampled_from(FLOATS), min_size=len(shapes), max_size=len(shapes)))
        models[model] = {
            f"layers.0.part{i}.weight": (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(
                TORCH_DTYPES[dtype]
            )
            for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        }
        models[model]["counts"] = torch.arange(5)
    return models


def reference(method: str, base: Tensor | None, experts: list[Tensor], weights: list[float]) -> Tensor:
    """The textbook formula in float64."""
    wide = [expert.double() for expert in experts]
    if method == "linear":
        return sum((w * e for w, e in zip(weights, wide, strict=True)), torch.zeros(())) / sum(weights)
    assert base is not None
    return base.double() + sum(w * (e - base.double()) for w, e in zip(weights, wide, strict=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    families(),
    st.sampled_from(["linear", "task_arithmetic"]),
    st.sampled_from([None, "float64", "float32", "float16", "bfloat16"]),
    st.sampled_from([64, 192, 1024, 4 << 20]),
    st.booleans(),
    st.data(),
)
def test_a_merge_is_the_formula_in_float64_rounded_once(models, method, out_dtype, slot_bytes, with_base, data):
    if method == "linear" and not with_base:
        del models["base"]
    storage = MemoryStorage(models)
    names = [name for name in models if name != "base"]
    weights = [data.draw(st.sampled_from([0.25, 1.0, 1.5])) for _ in names]
    experts = [{"model": name, "parameters": {"weight": w}} for name, w in zip(names, weights, strict=True)]
    more = {"models": experts} | ({"out_dtype": out_dtype} if out_dtype else {})
    plan = planned(storage, method, slot_bytes=slot_bytes, **more)
    merged = merged_in_memory(plan, storage)
    assert torch.equal(merged["counts"], torch.arange(5))
    for step in plan.steps:
        if step.name == "counts":
            continue
        inputs = [models[name][step.name] for name in names]
        base = models["base"][step.name] if "base" in models else None
        exact = reference(method, base, inputs, weights)
        found = merged[step.name]
        assert found.shape == exact.shape
        assert step.dtype == ({"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[out_dtype]
                              if out_dtype else storage_dtype(storage, step.name))  # fmt: skip
        arithmetic = torch.finfo(torch.float64 if step.compute_bytes == 8 else torch.float32)
        output = torch.finfo(found.dtype)
        size = sum((t.double().abs() * 2 for t in (*inputs, *([base] if base is not None else []))), torch.zeros(()))
        allowed = output.eps / 2 * exact.abs() + output.smallest_normal * output.eps + 8 * arithmetic.eps * size
        assert ((found.double() - exact).abs() <= allowed).all()


def storage_dtype(storage: MemoryStorage, name: str) -> str:
    return load_checkpoint(storage, next(iter(storage.contents))).tensors[name].dtype


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(families(), st.sampled_from(["linear", "task_arithmetic"]), st.sampled_from(["nearest", "stochastic"]))
def test_the_bytes_do_not_depend_on_the_size_of_slots(models, method, rounding):
    storage = MemoryStorage(models)
    more = {"rounding": rounding, "seed": 7, "out_dtype": "bfloat16"}
    first, *others = (
        merged_in_memory(planned(storage, method, slot_bytes=size, **more), storage) for size in (4 << 20, 64, 320)
    )
    for other in others:
        assert same(first, other)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "actmat", "leans_on_columns"])
def test_the_bytes_do_not_depend_on_slots_threads_or_budget(monkeypatch, method):
    storage = small_family()
    results = []
    monkeypatch.setattr(stream, "SMALL_MATRIX_ELEMENTS", 0)
    for slot_bytes, threads in itertools.product((64, 256, 4 << 20), (1, 2)):
        monkeypatch.setattr(stream, "thread_limit", lambda threads=threads: threads)
        results.append(merged_in_memory(planned(storage, method, slot_bytes=slot_bytes), storage))
    assert all(same(results[0], other) for other in results[1:])


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads work on the smallest pieces that there may be."""
    monkeypatch.setattr(memory, "PIECE_ELEMENTS", PANEL_ELEMENTS)


def long_family(dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, Tensor]]:
    """Tensors of several pieces, the last of them short."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"model.norm.weight": (3 * PANEL_ELEMENTS + 5,), "model.layers.0.mlp.down_proj.weight": (40, 900)}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    experts = [{name: w + 0.02 * torch.randn(w.shape, generator=draw) for name, w in base.items()} for _ in range(3)]
    return {
        name: {key: tensor.to(dtype) for key, tensor in model.items()}
        for name, model in zip(("base", "one", "two", "three"), (base, *experts), strict=True)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("task_arithmetic", {"lambda": 0.7}),
        ("ties", {}),
        ("ties", {"density": 0.4, "cancelled": "majority", "lambda": 0.7}),
        ("dare_ties", {"density": 0.5}),
        ("della", {"density": 0.5}),
        ("breadcrumbs_ties", {"density": 0.5}),
        ("actmat", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_the_bytes_do_not_depend_on_the_pieces_that_threads_work_on(monkeypatch, method, parameters, dtype):
    storage = MemoryStorage(long_family(dtype))
    more = {"parameters": parameters, "rounding": "stochastic", "out_dtype": "bfloat16"}
    whole = merged_in_memory(planned(storage, method, **more), storage)
    in_pieces(monkeypatch)
    for threads in (1, 3):
        monkeypatch.setattr(stream, "thread_limit", lambda threads=threads: threads)
        assert same(whole, merged_in_memory(planned(storage, method, **more), storage))


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("method", ["linear", "ties", "sce", "slerp"])
def test_pieces_take_no_more_than_was_planned(monkeypatch, method, threads):
    in_pieces(monkeypatch)
    monkeypatch.setattr(stream, "thread_limit", lambda: threads)
    models = long_family()
    if method == "slerp":
        del models["two"], models["three"]
    storage = MemoryStorage(models)
    more = {"parameters": {"t": 0.3}} if method == "slerp" else {}
    with Stream(planned(storage, method, **more), storage) as merging:
        for block in merging:
            block.release()
        facts = merging.memory_facts()
    assert facts["workspace_overdraft"] == 0
    assert 0 < facts["workspace_used"] <= facts["workspace_planned"]


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("model", ["base", "two"])
def test_what_is_not_finite_is_named_also_in_a_later_piece(monkeypatch, method, model):
    in_pieces(monkeypatch)
    models = long_family()
    models[model]["model.norm.weight"][2 * PANEL_ELEMENTS + 7] = math.nan
    if method == "linear":
        models["zero"] = models.pop("base")
    storage = MemoryStorage(models)
    name = "zero" if (model, method) == ("base", "linear") else model
    with pytest.raises(MergeError, match=rf"`model.norm.weight` in `{name}` holds NaN at \[{2 * PANEL_ELEMENTS + 7}\]"):
        streamed(Stream(planned(storage, method), storage))


def test_the_bytes_do_not_depend_on_the_memory_budget(family, tmp_path):
    for budget in ("130MiB", "1GiB"):
        streammerge.merge(recipe_of(family, "task_arithmetic"), tmp_path / budget, memory=budget)
    assert digests(tmp_path / "130MiB") == digests(tmp_path / "1GiB")


@pytest.mark.parametrize("method", ["linear", "mean"])
def test_tensors_come_in_the_plans_order_and_only_their_last_block_has_an_outcome(method):
    storage = small_family()
    plan = planned(storage, method, slot_bytes=128)
    data, outcomes = streamed(Stream(plan, storage))
    assert list(data) == [step.name for step in plan.steps]
    assert [len(data[step.name]) for step in plan.steps] == [step.write_bytes for step in plan.steps]
    assert [outcomes[step.name].method for step in plan.steps] == [step.method for step in plan.steps]


def test_each_byte_is_read_once_and_given_back_once():
    storage = small_family()
    plan = planned(storage, "mean", slot_bytes=128)
    reading = Stream(plan, storage)
    streamed(reading)
    fetched, released = storage.noted("fetch"), storage.noted("release")
    assert len(set(fetched)) == len(fetched)
    assert sorted(rest for _, *rest in fetched) == sorted(rest for _, *rest in released)
    assert reading.ahead.read_bytes == reading.to_read_bytes == sum(event[3] for event in fetched) == plan.read_bytes


def test_progress_ends_at_what_there_was_to_read_also_with_several_passes():
    storage = small_family()
    reading = Stream(planned(storage, "plans_two_takes_one"), storage)
    streamed(reading)
    assert reading.ahead.read_bytes == reading.to_read_bytes


def test_integers_masks_and_empty_tensors_pass_through(tmp_path):
    base = {
        "w": torch.randn(4, 4),
        "position_ids": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "tiny": torch.tensor([255, 0], dtype=torch.uint8),
        "none": torch.empty(0, 7),
        "h.0.attn.bias": torch.ones(1, 1, 3, 3).tril().log(),
    }
    other = {name: t + 1 if t.is_floating_point() and name != "h.0.attn.bias" else t for name, t in base.items()}
    storage = MemoryStorage({"base": base, "expert": other})
    merged = merged_in_memory(planned(storage, "task_arithmetic"), storage)
    for name in ("position_ids", "flags", "tiny", "none", "h.0.attn.bias"):
        assert torch.equal(merged[name], base[name]), name
    assert torch.equal(merged["w"], other["w"])


def test_a_skipped_tensor_is_neither_read_nor_written():
    storage = small_family()
    plan = planned(storage, "linear")
    skipped = {step.name for step in plan.steps[::2]}
    data, _ = streamed(Stream(plan, storage, skip=skipped))
    assert set(data) == {step.name for step in plan.steps} - skipped
    assert sum(event[3] for event in storage.noted("fetch")) == sum(
        step.read_bytes for step in plan.steps if step.name not in skipped
    )


def test_the_outcome_tells_how_far_a_tensor_moved():
    base = {"layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}
    storage = MemoryStorage({"base": base, "a": {k: t + 3 for k, t in base.items()}, "b": dict(base)})
    _, outcomes = streamed(Stream(planned(storage, "task_arithmetic"), storage))
    outcome = outcomes["layers.0.mlp.up_proj.weight"]
    assert outcome.changed == 1.0
    assert outcome.norm_ratio == pytest.approx(2.0)
    assert outcome.rounding_loss == 0.0
    assert outcome.seconds > 0


def test_what_rounding_takes_from_a_small_change_is_told():
    base = {"w": torch.ones(64, dtype=torch.bfloat16)}
    storage = MemoryStorage({"base": base, "a": {"w": base["w"].float() + 1e-3}})
    _, outcomes = streamed(Stream(planned(storage, "task_arithmetic", out_dtype="bfloat16"), storage))
    assert outcomes["w"].changed == 0.0
    assert outcomes["w"].rounding_loss == pytest.approx(1.0)


def test_torch_is_left_with_the_settings_it_had():
    threads = torch.get_num_threads()
    precision = torch.backends.mkldnn.matmul.fp32_precision
    storage = small_family()
    with Stream(planned(storage, "mean"), storage) as reading:
        next(iter(reading)).release()
    assert torch.get_num_threads() == threads
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_arithmetic_gets_the_cpus_that_this_process_may_use():
    assert 1 <= thread_limit() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("shape", [(16, 24), (3, 16, 24)], ids=["matrix", "stack"])
def test_small_matrices_are_merged_by_one_thread_and_large_ones_by_all(shape, monkeypatch):
    used: list[int] = []
    monkeypatch.setattr(stream, "thread_limit", lambda: 7)
    monkeypatch.setattr(stream.torch, "set_num_threads", used.append)
    name = f"model.layers.0.mlp.{'down_proj.weight' if len(shape) == 2 else 'experts.down_proj'}"
    models = {model: {name: torch.zeros(shape)} for model in ("base", "expert")}
    storage = MemoryStorage(models, {"model_type": "qwen3_moe"})
    for most in (16 * 24, 16 * 24 - 1):
        monkeypatch.setattr(stream, "SMALL_MATRIX_ELEMENTS", most)
        streamed(Stream(planned(storage, "mean"), storage))
    # each merge ends with what it found
    assert used[::2] == [1, 7]


AVERAGES = ("three_times", "backwards", "side_by_side", "asks_twice", "plans_two_takes_one", "returns_a_view")


@pytest.mark.parametrize("slot_bytes", [64, 4 << 20])
@pytest.mark.parametrize("method", [*AVERAGES, "overdraws"])
def test_a_method_may_ask_otherwise_than_planned_and_gets_the_same(method, slot_bytes):
    storage = small_family(torch.float32)
    right = merged_in_memory(planned(storage, "mean"), storage)
    found = merged_in_memory(planned(storage, method, slot_bytes=slot_bytes), storage)
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("slot_bytes", [64, 4 << 20])
def test_a_method_may_stop_early(slot_bytes):
    storage = small_family(torch.float32)
    alone = MemoryStorage({"base": llama_tensors(dtype=torch.float32)})
    alone.contents["expert0"] = storage.contents["expert0"]
    plan = planned(storage, "stops_early", slot_bytes=slot_bytes)
    found, right = merged_in_memory(plan, storage), merged_in_memory(planned(alone, "mean"), alone)
    for step in plan.steps:
        if step.by_matrix:
            assert torch.equal(found[step.name], right[step.name])


@pytest.mark.parametrize("slot_bytes", [64, 4 << 20])
def test_a_method_may_ask_for_nothing(slot_bytes):
    storage = small_family()
    plan = planned(storage, "never_asks", slot_bytes=slot_bytes)
    found, base = merged_in_memory(plan, storage), llama_tensors()
    assert any(step.by_matrix for step in plan.steps)
    assert all(torch.equal(found[step.name], base[step.name]) for step in plan.steps if step.by_matrix)


@pytest.mark.parametrize("method", AVERAGES)
def test_what_is_read_out_of_turn_is_given_back_too(method):
    storage = small_family()
    streamed(Stream(planned(storage, method, slot_bytes=64), storage))
    left = {tuple(rest) for _, *rest in storage.noted("fetch")} - {tuple(rest) for _, *rest in storage.noted("release")}
    assert left == set()


@pytest.mark.parametrize("slot_bytes", [64, 4 << 20])
def test_a_method_sees_gpt2s_matrices_as_out_by_in(slot_bytes):
    generator = torch.Generator().manual_seed(3)
    name = "transformer.h.0.mlp.c_fc.weight"
    base = {name: torch.randn(6, 20, generator=generator), "transformer.h.0.mlp.c_fc.bias": torch.zeros(20)}
    expert = {key: t + torch.randn(t.shape, generator=generator) for key, t in base.items()}
    storage = MemoryStorage({"base": base, "expert": expert}, GPT2)
    merged = merged_in_memory(planned(storage, "leans_on_columns", slot_bytes=slot_bytes), storage)
    # six inputs, stored as rows: each row of the change is scaled by its number
    right = base[name] + (expert[name] - base[name]) * torch.arange(6.0).unsqueeze(1)
    torch.testing.assert_close(merged[name], right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [*AVERAGES, "stops_early", "mean"])
def test_a_transposed_matrix_merges_as_its_transpose_would(method):
    generator = torch.Generator().manual_seed(4)
    plain = {"transformer.h.0.attn.c_proj.weight": torch.randn(24, 10, generator=generator)}
    expert = {key: t + torch.randn(t.shape, generator=generator) for key, t in plain.items()}
    stored = {
        "base": {name: t.T.contiguous() for name, t in plain.items()},
        "expert": {name: t.T.contiguous() for name, t in expert.items()},
    }
    transposed = MemoryStorage(stored, GPT2)
    straight = MemoryStorage({"base": plain, "expert": expert}, {"model_type": "gpt_bigcode"})
    found = merged_in_memory(planned(transposed, method, slot_bytes=128), transposed)
    right = merged_in_memory(planned(straight, method, slot_bytes=128), straight)
    for name in plain:
        assert torch.equal(found[name].T, right[name])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_transposed_matrix_is_rounded_the_same_whatever_the_slots(rounding):
    base = {"transformer.h.0.mlp.c_fc.weight": torch.randn(48, 64, generator=torch.manual_seed(5))}
    storage = MemoryStorage({"base": base, "expert": {k: t + 0.1 for k, t in base.items()}}, GPT2)
    more = {"out_dtype": "bfloat16", "rounding": rounding}
    results = [merged_in_memory(planned(storage, "mean", slot_bytes=s, **more), storage) for s in (256, 1024, 4 << 20)]
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_a_method_that_raises_stops_everything(family, tmp_path):
    with pytest.raises(ZeroDivisionError, match="a method's own mistake"):
        streammerge.merge(recipe_of(family, "raises"), tmp_path / "out")
    assert streammerge_threads() == []
    assert not (tmp_path / "out").exists()
    assert {path.name for path in models_under(tmp_path)} == set(family)


def test_the_stream_stops_its_thread_when_left_in_the_middle():
    storage = small_family()
    with Stream(planned(storage, "linear", slot_bytes=64), storage) as reading:
        next(iter(reading))
    assert streammerge_threads() == []
    assert len(storage.noted("close")) <= 4


def test_an_input_that_cannot_be_read_stops_the_stream():
    storage = small_family()
    storage.fail_at = 30
    with pytest.raises(OSError, match="Input/output error"):
        streamed(Stream(planned(storage, "linear"), storage))
    assert streammerge_threads() == []


BAD = {"nan": (math.nan, "NaN"), "inf": (math.inf, "an infinity"), "-inf": (-math.inf, "an infinity")}
PLACES = {
    "model.layers.1.mlp.down_proj.weight": (11, 33),
    "model.layers.0.input_layernorm.weight": (5,),
    "model.embed_tokens.weight": (60, 1),
}


@pytest.mark.parametrize("slot_bytes", [64, 4 << 20])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "mean"])
def test_what_is_not_finite_is_named_by_tensor_model_and_index(method, name, bad, slot_bytes):
    value, word = BAD[bad]
    for model in ("base", "expert0", "expert2"):
        if model == "base" and method == "linear":
            # a method that needs no base does not read it
            continue
        base = llama_tensors()
        models = {"base": base, **{f"expert{i}": tuned(base, i + 1) for i in range(3)}}
        models[model][name] = models[model][name].clone()
        models[model][name][PLACES[name]] = value
        storage = MemoryStorage(models)
        with pytest.raises(MergeError) as caught:
            streamed(Stream(planned(storage, method, slot_bytes=slot_bytes), storage))
        assert caught.value.message == f"`{name}` in `{model}` holds {word} at {list(PLACES[name])}"
        assert caught.value.hint == (
            "The checkpoint is damaged or its training diverged. Fetch it again, or leave it out."
        )


def test_nan_in_a_transposed_matrix_is_named_where_the_file_has_it():
    name = "transformer.h.0.mlp.c_fc.weight"
    base = {name: torch.zeros(6, 20)}
    bad = {name: torch.zeros(6, 20)}
    bad[name][4, 17] = math.nan
    storage = MemoryStorage({"base": base, "expert": bad}, GPT2)
    with pytest.raises(MergeError, match=r"`expert` holds NaN at \[4, 17\]"):
        streamed(Stream(planned(storage, "mean", slot_bytes=64), storage))


def test_nan_in_a_scalar_is_named():
    storage = MemoryStorage({"base": {"scale": torch.tensor(1.0)}, "expert": {"scale": torch.tensor(math.nan)}})
    with pytest.raises(MergeError, match=r"`scale` in `expert` holds NaN at \[\]"):
        streamed(Stream(planned(storage, "task_arithmetic"), storage))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("method", ["linear", "mean"])
def test_large_finite_numbers_pass(method, name):
    big = torch.full((4, 4) if "proj" in name else (4,), 3e38)
    storage = MemoryStorage({"base": {name: big}, "expert": {name: big}})
    assert torch.equal(merged_in_memory(planned(storage, method), storage)[name], big)


@pytest.mark.parametrize(("dtype", "big"), [(torch.float32, 1e38), (torch.float64, 1e200)])
@pytest.mark.parametrize("method", ["task_arithmetic", "mean"])
def test_changes_whose_norm_overflows_are_merged_and_the_report_stays_json(tmp_path, method, dtype, big):
    name = "model.layers.0.mlp.up_proj.weight"
    base = {name: torch.zeros(40, 40, dtype=dtype)}
    expert = {name: torch.full((40, 40), big, dtype=dtype)}
    folders = {"base": save_model(tmp_path / "base", base), "expert": save_model(tmp_path / "expert", expert)}
    report = streammerge.merge(recipe_of(folders, method), tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[name], expert[name])
    json.loads(report.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("method", ["task_arithmetic", "mean"])
def test_what_float16_cannot_hold_is_refused_also_for_tensors_that_are_kept(method, name, keep):
    big = torch.full((4, 4) if "proj" in name else (4,), 1e5)
    storage = MemoryStorage({"base": {name: big}, "expert": {name: big}})
    more = {"rules": [{"match": ".", "keep": "base"}]} if keep else {}
    with pytest.raises(MergeError, match=rf"`{name}`.* leaves the range of F16 in {big.numel()} elements") as caught:
        streamed(Stream(planned(storage, method, out_dtype="float16", **more), storage))
    assert caught.value.hint == "Choose a wider `out_dtype`, such as float32, or another method."


def test_infinities_of_a_mask_stay_what_they_are_in_float16():
    mask = {"h.0.attn.bias": torch.ones(1, 1, 3, 3).tril().log()}
    storage = MemoryStorage({"base": mask, "expert": mask}, GPT2)
    merged = merged_in_memory(planned(storage, "linear", out_dtype="float16"), storage)
    assert torch.equal(merged["h.0.attn.bias"].float(), mask["h.0.attn.bias"])


def test_a_sum_that_overflows_is_the_methods_doing_and_refused():
    storage = MemoryStorage({"base": {"w": torch.full((3,), -3e38)}, "expert": {"w": torch.full((3,), 3e38)}})
    with pytest.raises(MergeError, match=r"`w` merged by `task_arithmetic` leaves the range of F32 in 3 elements"):
        streamed(Stream(planned(storage, "task_arithmetic"), storage))


def test_nothing_is_left_of_a_merge_that_met_a_nan(tmp_path):
    base = llama_tensors()
    bad = tuned(base, 1)
    bad["lm_head.weight"][0, 0] = math.nan
    folders = {"base": save_model(tmp_path / "base", base), "math": save_model(tmp_path / "math", bad)}
    with pytest.raises(MergeError):
        streammerge.merge(recipe_of(folders, "task_arithmetic"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {path.name for path in models_under(tmp_path)} == {"base", "math"}


@pytest.mark.long
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(families(), st.sampled_from(["linear", "task_arithmetic"]), st.sampled_from([64, 128, 448, 2048]))
def test_many_families_merge_the_same_in_any_slots(models, method, slot_bytes):
    storage = MemoryStorage(models)
    assert same(
        merged_in_memory(planned(storage, method), storage),
        merged_in_memory(planned(storage, method, slot_bytes=slot_bytes), storage),
    )


def test_a_merged_folder_holds_what_the_stream_gave(family, tmp_path):
    recipe = recipe_of(family, "leans_on_columns")
    streammerge.merge(recipe, tmp_path / "out", max_shard_size="6KB")
    plan = make_plan(Recipe.load(recipe), LocalStorage())
    data, _ = streamed(Stream(plan, LocalStorage()))
    found = tensors_of(Path(tmp_path / "out"))
    for name, tensor in found.items():
        assert tensor.view(-1).view(torch.uint8).numpy().tobytes() == data[name]
    assert found.keys() == data.keys()
