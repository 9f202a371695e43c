"""How fast this machine has merged before: read, write and arithmetic rates kept between runs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured in earlier merges here: bytes per second read and written, FLOPs per second computed."""

    read_bytes_per_second: float
    write_bytes_per_second: float
    flops_per_second: float

    def seconds(self, read_bytes: int, write_bytes: int, flops: int) -> float:
        """Predicted wall time, as if reading, computing and writing overlapped fully."""
        return max(
            read_bytes / self.read_bytes_per_second,
            write_bytes / self.write_bytes_per_second,
            flops / self.flops_per_second,
        )


def rates_path() -> Path:
    """The file that holds them, under `$XDG_CACHE_HOME` or `~/.cache`. Raises RuntimeError without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "streammerge" / "rates.json"


def load_rates(kind: str) -> Rates | None:
    """Rates of merges of one kind ("element" or "matrix"); None when none was measured here yet."""
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
        staged = path.with_suffix(f".{os.getpid()}")
        staged.write_text(json.dumps({**table, kind: asdict(rates)}, indent=2))
        staged.replace(path)
    except (OSError, RuntimeError):
        pass
