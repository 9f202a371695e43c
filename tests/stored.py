"""Models in memory, and what a merge left behind read back."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from streammerge.checkpoint import ByteFile, FileFacts
from streammerge.device_stream import DeviceStream
from streammerge.outcome import Outcome
from streammerge.plan import Plan
from streammerge.stream import Stream
from streammerge.torch_dtypes import TORCH_DTYPES

Event = tuple[str, str, int, int]


class MemoryStorage:
    """Whole models in memory, one safetensors file each. `events` notes every fetch, release and close.

    fail_at  the fetch, counted from 0, that raises `failure`
    """

    def __init__(self, models: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, object] | None = None) -> None:
        self.contents = {
            location: {
                "model.safetensors": save({name: t.contiguous() for name, t in tensors.items()}),
                "config.json": json.dumps(config or {}).encode(),
            }
            for location, tensors in models.items()
        }
        self.events: list[Event] = []
        self.fail_at: int | None = None
        self.failure: BaseException = OSError(5, "Input/output error")

    def files(self, location: str) -> dict[str, FileFacts]:
        return {name: FileFacts(len(data), 0) for name, data in self.contents[location].items()}

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        return self.contents[location][name][offset : offset + nbytes]

    def open(self, location: str, name: str) -> ByteFile:
        return _MemoryFile(self, location, self.contents[location][name])

    def noted(self, kind: str) -> list[Event]:
        return [event for event in self.events if event[0] == kind]


class _MemoryFile:
    def __init__(self, storage: MemoryStorage, location: str, data: bytes) -> None:
        self._storage, self._location, self._data = storage, location, data

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        if len(self._storage.noted("fetch")) == self._storage.fail_at:
            raise self._storage.failure
        self._storage.events.append(("fetch", self._location, offset, nbytes))
        buffer[:nbytes] = self._data[offset : offset + nbytes]
        return buffer[:nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        self._storage.events.append(("release", self._location, offset, nbytes))

    def close(self) -> None:
        self._storage.events.append(("close", self._location, 0, 0))


def streamed(stream: Stream | DeviceStream) -> tuple[dict[str, bytes], dict[str, Outcome]]:
    """Every tensor's bytes and outcome, after a look at the order in which they come."""
    tensors: dict[str, bytearray] = {}
    outcomes: dict[str, Outcome] = {}
    with stream:
        for block in stream:
            assert block.name not in outcomes, f"{block.name} goes on after its last block"
            written = tensors.setdefault(block.name, bytearray())
            assert block.offset == len(written), f"{block.name} jumps to {block.offset} from {len(written)}"
            written += block.data
            block.release()
            if block.outcome is not None:
                outcomes[block.name] = block.outcome
    assert list(tensors) == list(outcomes)
    return {name: bytes(data) for name, data in tensors.items()}, outcomes


def merged_in_memory(plan: Plan, storage: MemoryStorage) -> dict[str, Tensor]:
    """The merged tensors, by name in the plan's order."""
    data, _ = streamed(Stream(plan, storage))
    assert list(data) == [step.name for step in plan.steps]
    return {step.name: tensor_of(data[step.name], step.dtype, step.shape) for step in plan.steps}


def streamed_tensors(plan: Plan, storage: MemoryStorage) -> dict[str, Tensor]:
    """The merged tensors by the engine that the plan is for, by name in the plan's order."""
    data, _ = streamed((Stream if plan.device_memory is None else DeviceStream)(plan, storage))
    return {step.name: tensor_of(data[step.name], step.dtype, step.shape) for step in plan.steps}


def tensor_of(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor from its stored bytes."""
    if not data:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype]).view(shape)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, read by safetensors itself."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    """Every file of a merge but those that tell its time and place: the report and the card."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in ("streammerge.json", "README.md")
    }


def models_under(folder: Path) -> list[Path]:
    """Folders that a person or a loader could take for a model."""
    return [
        path.parent
        for path in folder.rglob("config.json")
        if any(each.suffix == ".safetensors" for each in path.parent.iterdir())
    ]


def streammerge_threads() -> list[str]:
    """Threads of ours that are still alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streammerge")]
