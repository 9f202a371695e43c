"""The command line with some of a merge's checks patched to nothing, for `checks.py` to time: none is a switch.

python bench/unchecked.py CHECK,CHECK… merge RECIPE OUT --json
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from streammerge import cli, merging, stream, streamed_deltas, write
from streammerge.solve.systems import System
from streammerge_kernels import apply


def inputs() -> None:
    """Norms of the base and of every expert's change: they see NaN and infinities, and growth is made of them."""
    finite = torch.zeros(())

    class Torch:
        linalg = SimpleNamespace(vector_norm=lambda *_, **__: finite)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    streamed_deltas.torch = Torch()  # type: ignore[assignment]


def outputs() -> None:
    """Looking for NaN and infinities in what was rounded."""
    none = torch.zeros((), dtype=torch.int64)
    apply._non_finite = lambda out, exact: none


def measures() -> None:
    """The merged change's norm, what rounding lost of it, and how many elements changed."""
    real = stream.apply_
    stream.apply_ = lambda *operands, **named: real(*operands, **{**named, "measure": False})


def checksums() -> None:
    """SHA-256 of every tensor, beside its writing."""
    write._HASHED_BESIDE_BYTES = sys.maxsize
    digest = SimpleNamespace(update=lambda data: None, hexdigest=lambda: "0" * 64)
    write.hashlib = SimpleNamespace(**{**vars(hashlib), "sha256": lambda *_: digest})  # type: ignore[assignment]


def changed() -> None:
    """Comparing the inputs' sizes, times and headers with what they were, at the end."""
    merging.refuse_changed = lambda planned, storage, writer: None


def certificates() -> None:
    """One refinement step of 32 rows of each solved system."""
    System.certificate = lambda *_: 0.0  # type: ignore[method-assign]


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check for check in (inputs, outputs, measures, checksums, changed, certificates)
}


def main() -> None:
    names = sys.argv.pop(1)
    for name in filter(None, names.split(",")):
        CHECKS[name]()
    cli.main()


if __name__ == "__main__":
    main()
