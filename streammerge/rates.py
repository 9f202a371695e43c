"""How fast this machine has merged before: read, write and arithmetic rates kept between runs."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

# what there was none of says nothing about its rate: as if it took no time
_UNKNOWN = 1e18


@dataclass(frozen=True, slots=True)
class Work:
    """What a merge has to do, as its time depends on it.

    read_bytes     each as often as it is read
    matrix_flops   arithmetic of the steps that merge matrices, in FLOPs or what takes as long
    element_bytes  read and written by all other steps
    """

    read_bytes: int
    write_bytes: int
    matrix_flops: int
    element_bytes: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured in earlier merges here: bytes per second read, written, and merged by element; FLOPs per second."""

    read_bytes_per_second: float
    write_bytes_per_second: float
    flops_per_second: float
    element_bytes_per_second: float

    def seconds(self, work: Work) -> float:
        """Predicted wall time, as if reading, computing and writing overlapped fully."""
        return max(
            work.read_bytes / self.read_bytes_per_second,
            work.write_bytes / self.write_bytes_per_second,
            self.computing_seconds(work),
        )

    def computing_seconds(self, work: Work) -> float:
        """Predicted time of the arithmetic alone."""
        return work.matrix_flops / self.flops_per_second + work.element_bytes / self.element_bytes_per_second


def measured(work: Work, reading: float, writing: float, computing: float, matrices: float) -> Rates:
    """The rates of a merge from its seconds: of these, computing took `matrices` for the steps that merge matrices."""
    matrices = min(matrices, computing) if work.element_bytes else computing
    return Rates(
        _rate(work.read_bytes, reading),
        _rate(work.write_bytes, writing),
        _rate(work.matrix_flops, matrices),
        _rate(work.element_bytes, computing - matrices if work.matrix_flops else computing),
    )


def _rate(amount: int, seconds: float) -> float:
    return amount / max(seconds, 1e-9) if amount else _UNKNOWN


def rates_path() -> Path:
    """The file that holds them, under `$XDG_CACHE_HOME` or `~/.cache`. Raises RuntimeError without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "streammerge" / "rates.json"


def load_rates(*kinds: str) -> Rates | None:
    """Rates of merges of the first of these kinds that was measured here; None when none was yet."""
    return next(filter(None, map(_load, kinds)), None)


def _load(kind: str) -> Rates | None:
    try:
        table = json.loads(rates_path().read_text())
        rates = Rates(**{key: float(value) for key, value in table[kind].items()})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rates if all(0 < rate < math.inf for rate in asdict(rates).values()) else None


def save_rates(kind: str, rates: Rates) -> None:
    """Remember the newest measurement. A home that cannot be written to is no reason to fail a merge."""
    try:
        path = rates_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            table = json.loads(path.read_text())
        except (OSError, ValueError):
            table = {}
        table = table if isinstance(table, dict) else {}
        staged = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        staged.write_text(json.dumps({**table, kind: asdict(rates)}, indent=2))
        staged.replace(path)
    except (OSError, RuntimeError):
        pass
