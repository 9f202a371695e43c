"""Model files of a benchmark: their tensors, and their place in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def read_tensor(model: Path, name: str) -> Tensor:
    """One tensor of a sharded model, by the safetensors library."""
    with safe_open(tensor_places(model)[name], "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def tensor_places(model: Path) -> dict[str, Path]:
    """Which file each tensor is in."""
    places: dict[str, Path] = {}
    for file in weight_files([model]):
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    return places


def weight_files(models: Iterable[Path]) -> list[Path]:
    """The safetensors files of some model folders."""
    return [file for model in models for file in sorted(model.glob("*.safetensors"))]


def make_durable(files: Iterable[Path]) -> None:
    """fsync, for a writer that leaves its bytes in the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def make_cold(files: Iterable[Path]) -> int:
    """Drop the files' own pages from the page cache. Returns the bytes that stayed all the same."""
    left = 0
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left += cached_bytes(file)
    return left


def make_warm(files: Iterable[Path]) -> None:
    """Read the files once."""
    buffer = bytearray(1 << 23)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def cached_bytes(file: Path) -> int:
    """How much of a file is in the page cache, by `mincore`."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        view = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), resident
        )
        del view
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {file.name}")
    return mmap.PAGESIZE * sum(page & 1 for page in bytes(resident))
