"""Make a seeded, Llama-shaped base model and its fine-tuned experts, tensor by tensor.

python bench/generate.py DIR --size 1.1b --experts 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from llama import SIZES, Shape, tokenizer
from numpy.typing import NDArray

FORMAT = 1  # raise it when the same settings stop giving the same bytes
MARKER = "set.json"
BASE_SCALE = 0.02
KINDS = {"sft": (0.025,), "rl": (0.0005,), "mixed": (0.025, 0.0005)}  # change over base, expert by expert
RANK, LOW_RANK_ENERGY = 64, 0.5
BLOCK_ELEMENTS = 1 << 22

Floats = NDArray[np.float32]
Words = NDArray[np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides the bytes of a set; expert i does not depend on how many there are."""

    size: str = "1.1b"
    layers: int | None = None
    shards: int = 2
    kind: str = "sft"
    seed: int = 0

    def shape(self) -> Shape:
        shape = SIZES[self.size]
        return shape if self.layers is None else replace(shape, num_hidden_layers=self.layers)


class Folder:
    """One model's folder: shard headers are final before the first tensor is written."""

    def __init__(self, path: Path, shape: Shape, shards: int) -> None:
        path.mkdir(parents=True)
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        tensors, sizes = shape.tensors(), shape.nbytes()
        # what is another tensor's, too, is left out of the file by leaving a hole there
        self._holes = any(shape.twin(name) != name for name in tensors)
        weight_map: dict[str, str] = {}
        groups = shape.shards(shards)
        for number, group in enumerate(groups, start=1):
            file = path / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._create(file, {name: tensors[name] for name in group})
            weight_map |= dict.fromkeys(group, file.name)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        for file_name, content in {
            "model.safetensors.index.json": index,
            "config.json": shape.config(),
            **tokenizer(),
        }.items():
            (path / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _create(self, file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, starts = 0, {}
        for name, dims in tensors.items():
            end = offset + _nbytes(dims)
            header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
            starts[name], offset = offset, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        if self._holes:
            os.truncate(descriptor, 8 + len(text) + offset)
        else:
            os.posix_fallocate(descriptor, 0, 8 + len(text) + offset)
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        self._files.append(descriptor)
        for name, start in starts.items():
            self._places[name] = (descriptor, 8 + len(text) + start)

    def write(self, name: str, skip_elements: int, words: Words) -> None:
        """Put bf16 words at an element offset of a tensor; any thread may."""
        descriptor, start = self._places[name]
        view, offset = words.data.cast("B"), start + 2 * skip_elements
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written

    def flush(self) -> None:
        """Make what was written durable, and leave none of it in the page cache."""
        for descriptor in self._files:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self.flush()
        for descriptor in self._files:
            os.close(descriptor)


def ensure(directory: Path, settings: Settings, *, experts: int) -> list[Path]:
    """The base's folder and `experts` experts' folders, made only where they do not exist yet."""
    folders = [directory / "base", *(directory / f"expert-{i}" for i in range(1, experts + 1))]
    wanted = {"format": FORMAT, **asdict(settings)}
    marker = directory / MARKER
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
    if found and found["complete"] and found["settings"] == wanted and found["experts"] >= experts:
        return folders
    if found is None and directory.exists() and any(directory.iterdir()):
        raise SystemExit(f"error: `{directory}` holds something else than a generated set")
    for old in [directory / "base", *directory.glob("expert-*")]:
        shutil.rmtree(old, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    record = {"settings": wanted, "experts": experts, "complete": False}
    marker.write_text(json.dumps(record) + "\n", encoding="utf-8")
    _write(folders, settings)
    marker.write_text(json.dumps(record | {"complete": True}) + "\n", encoding="utf-8")
    return folders


def trim(directory: Path, *, experts: int) -> None:
    """Delete a set's experts beyond the first few, to make room; none at all deletes the base too."""
    if not (directory / MARKER).exists():
        return
    if experts == 0:
        shutil.rmtree(directory)
        return
    record = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    kept = min(record["experts"], experts)
    (directory / MARKER).write_text(json.dumps(record | {"experts": kept}) + "\n", encoding="utf-8")
    for number in range(kept + 1, record["experts"] + 1):
        shutil.rmtree(directory / f"expert-{number}", ignore_errors=True)


def _write(folders: list[Path], settings: Settings) -> None:
    shape = settings.shape()
    models = [Folder(path, shape, settings.shards) for path in folders]
    unflushed = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, dims in shape.tensors().items():
            if shape.twin(name) != name:
                continue
            list(threads.map(lambda rows: _fill(models, settings, *rows), _blocks(name, dims)))
            unflushed += _nbytes(dims) * len(models)
            if unflushed > 1 << 29:
                unflushed = 0
                list(threads.map(Folder.flush, models))
    for model in models:
        model.close()


def _blocks(name: str, dims: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Cut a tensor into runs of rows: (name, its shape, first row, last row + 1)."""
    step = max(1, BLOCK_ELEMENTS // (dims[1] if len(dims) == 2 else 1))
    for first in range(0, dims[0], step):
        yield name, dims, first, min(first + step, dims[0])


def _fill(models: list[Folder], settings: Settings, name: str, dims: tuple[int, ...], first: int, last: int) -> None:
    """Draw one block of the base and of every expert, and write them."""
    block = (last - first, *dims[1:])
    columns = dims[1] if len(dims) == 2 else 1
    base = _normal(settings.seed, name, "base", first, block)
    base *= BASE_SCALE
    if len(dims) == 1:
        base += 1.0
    rounded = torch.from_numpy(base).bfloat16()
    models[0].write(name, first * columns, rounded.view(torch.uint16).numpy())
    stored = rounded.float().numpy()
    scales = KINDS[settings.kind]
    for number, model in enumerate(models[1:]):
        change = _normal(settings.seed, name, f"noise {number}", first, block)
        if len(dims) == 2:
            change *= np.float32((1 - LOW_RANK_ENERGY) ** 0.5)
            change += _low_rank(settings.seed, name, number, first, dims, len(change))
        change *= np.float32(BASE_SCALE * scales[number % len(scales)])
        change += stored
        words = torch.from_numpy(change).bfloat16().view(torch.uint16).numpy()
        model.write(name, first * columns, words)


def _low_rank(seed: int, name: str, number: int, first: int, dims: tuple[int, ...], rows: int) -> Floats:
    """Rows of U diag(1, 1/2, 1/3, …) V^T, scaled to the variance LOW_RANK_ENERGY."""
    rank = min(RANK, *dims)
    left = _normal(seed, name, f"left {number}", first, (rows, rank))
    right = _normal(seed, name, f"right {number}", 0, (rank, dims[1]))
    decay = 1.0 / np.arange(1, rank + 1)
    decay *= (LOW_RANK_ENERGY / np.square(decay).sum()) ** 0.5
    product: Floats = left @ (right * decay[:, None].astype(np.float32))
    return product


def _normal(seed: int, name: str, part: str, first: int, shape: tuple[int, ...]) -> Floats:
    """Standard normal numbers [*shape] keyed by seed, tensor, part and first row alone."""
    key = [seed, zlib.crc32(name.encode()), zlib.crc32(part.encode()), first]
    drawn: Floats = np.random.Generator(np.random.SFC64(key)).standard_normal(shape, dtype=np.float32)
    return drawn


def _nbytes(dims: tuple[int, ...]) -> int:
    return 2 * int(np.prod(dims))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--layers", type=int, help="decoder layers, instead of the size's own")
    parser.add_argument("--shards", type=int, default=2, help="files per model")
    parser.add_argument("--kind", choices=KINDS, default="sft", help="sft: 2.5 %% of the base's scale; rl: 0.05 %%")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    settings = Settings(size=given.size, layers=given.layers, shards=given.shards, kind=given.kind, seed=given.seed)
    began = time.perf_counter()
    folders = ensure(given.directory, settings, experts=given.experts)
    written = sum(f.stat().st_size for folder in folders for f in folder.glob("*.safetensors"))
    print(f"{len(folders)} models, {written / 1e9:.2f} GB, ready in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
