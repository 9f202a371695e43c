"""Derived tensors: computed as they are read, and merged like any others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from streammerge import models
from streammerge.checkpoint import DTYPE_BYTES, Checkpoint, TensorEntry, load_checkpoint
from streammerge.derived import DerivedEntry, ReadPart
from streammerge.plan import Plan, make_plan
from streammerge.readahead import ReadAhead, cut
from streammerge.recipe import Recipe
from streammerge.stream import Stream
from tests.stored import MemoryStorage, streamed, streamed_tensors

SHAPE = 48, 32
METHODS = ("linear", "ties", "actmat", "model_stock")


@dataclass(frozen=True, slots=True)
class Scaled:
    """Its one part, times a factor, in another dtype."""

    factor: float

    def scratch_bytes(self, entry: DerivedEntry, elements: int) -> int:
        return elements * DTYPE_BYTES[entry.parts[0].dtype]

    def fill(self, entry: DerivedEntry, out: Tensor, first_element: int, read: ReadPart) -> None:
        out.copy_(read(entry.parts[0], first_element, out.numel())).mul_(self.factor)


def scaled(part: TensorEntry, factor: float, dtype: str = "F32") -> DerivedEntry:
    return DerivedEntry(
        name=part.name,
        dtype=dtype,
        shape=part.shape,
        file=part.file,
        offset=part.offset,
        nbytes=part.elements * DTYPE_BYTES[dtype],
        parts=(part,),
        derivation=Scaled(factor),
    )


def view(model: Checkpoint) -> Checkpoint:
    """The second expert holds half of what it means, the base twice as much, twice over."""
    if model.location == "two":
        return replace(model, tensors={name: scaled(entry, 2.0) for name, entry in model.tensors.items()})
    if model.location == "base":
        tensors = {name: scaled(scaled(entry, 0.25), 2.0) for name, entry in model.tensors.items()}
        return replace(model, tensors=tensors)
    return model


def family(dtype: torch.dtype = torch.float32) -> tuple[MemoryStorage, MemoryStorage]:
    """Models as they are stored, and what they mean, stored plainly."""
    generator = torch.Generator().manual_seed(1)

    def model() -> dict[str, Tensor]:
        names = {"model.layers.0.mlp.up_proj.weight": SHAPE, "model.norm.weight": SHAPE[1:]}
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.items()}

    base, one, two = model(), model(), model()
    stored = {
        "base": {name: tensor * 2 for name, tensor in base.items()},
        "one": one,
        "two": {name: tensor / 2 for name, tensor in two.items()},
    }
    meant = {"base": base, "one": one, "two": two}
    return MemoryStorage(stored), MemoryStorage(
        {name: {key: tensor.float() for key, tensor in tensors.items()} for name, tensors in meant.items()}
        if dtype != torch.float32
        else meant
    )


def plan_of(storage: MemoryStorage, method: str, **options: object) -> Plan:
    recipe = {"merge_method": method, "base_model": "base", "models": [{"model": "one"}, {"model": "two"}]}
    return make_plan(Recipe.from_dict(recipe), storage, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_derived_tensors_merge_to_what_stored_ones_would(method, dtype, monkeypatch):
    stored, meant = family(dtype)
    options = {"memory_bytes": 256 << 20}
    expected = streamed_tensors(plan_of(meant, method, **options), meant)
    monkeypatch.setattr(models, "VIEWS", (view,))
    plan = plan_of(stored, method, **options)
    found = streamed_tensors(plan, stored)
    assert {entry.dtype for entry in plan.models[2].tensors.values()} == {"F32"}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_device_stream_reads_derived_tensors_too(monkeypatch):
    stored, meant = family()
    expected = streamed_tensors(plan_of(meant, "linear"), meant)
    monkeypatch.setattr(models, "VIEWS", (view,))
    found = streamed_tensors(plan_of(stored, "linear", device="cpu", device_memory_bytes=1 << 30), stored)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_a_run_is_the_same_wherever_it_begins():
    stored, _ = family()
    model = load_checkpoint(stored, "two")
    entry = scaled(model.tensors["model.layers.0.mlp.up_proj.weight"], 2.0)
    found = []
    for block in (entry.elements, 100):
        requests = list(cut(0, entry, block, last=True))
        ahead = ReadAhead(stored, [model], requests, slots=2, slot_bytes=block * 4)
        runs = []
        for _ in requests:
            slot = ahead.take()
            runs.append(slot.data.view(torch.float32).clone())
            ahead.give_back(slot)
        ahead.close()
        found.append(torch.cat(runs))
    assert torch.equal(*found)


def test_what_the_parts_took_is_given_back(monkeypatch):
    stored, _ = family()
    monkeypatch.setattr(models, "VIEWS", (view,))
    streamed(Stream(plan_of(stored, "linear"), stored))
    fetched = sorted(event[1:] for event in stored.noted("fetch"))
    assert fetched == sorted(event[1:] for event in stored.noted("release"))


def test_the_plan_counts_stored_bytes_and_the_memory_that_computing_takes(monkeypatch):
    stored, _ = family(torch.bfloat16)
    before = plan_of(stored, "linear")
    monkeypatch.setattr(models, "VIEWS", (view,))
    after = plan_of(stored, "linear")
    assert after.read_bytes == before.read_bytes
    assert after.memory.reserve_bytes > before.memory.reserve_bytes


def test_an_error_while_computing_ends_the_merge(monkeypatch):
    @dataclass(frozen=True, slots=True)
    class Failing(Scaled):
        def fill(self, entry: DerivedEntry, out: Tensor, first_element: int, read: ReadPart) -> None:
            raise ValueError("no such thing")

    def failing(model: Checkpoint) -> Checkpoint:
        tensors = {name: replace(scaled(e, 1.0), derivation=Failing(1.0)) for name, e in model.tensors.items()}
        return replace(model, tensors=tensors)

    stored, _ = family()
    monkeypatch.setattr(models, "VIEWS", (failing,))
    with Stream(plan_of(stored, "linear"), stored) as stream, pytest.raises(ValueError, match="no such thing"):
        list(stream)
