"""What happened, for each tensor and in all: JSON beside the model, a summary on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from streammerge.budget import format_bytes
from streammerge.errors import OutputError, quoted
from streammerge.outcome import Outcome

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Where the wall time went.

    waiting_for_input   the arithmetic stood still because the next bytes were not read yet
    waiting_for_output  it stood still because earlier results were not written yet
    reading, writing    how long those threads were busy, beside the arithmetic
    """

    wall: float
    waiting_for_input: float
    waiting_for_output: float
    reading: float
    writing: float

    @property
    def computing(self) -> float:
        """Wall time less waiting."""
        return self.wall - self.waiting_for_input - self.waiting_for_output


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A finished merge.

    tensors    each tensor's outcome, in the order of merging
    checksums  SHA-256 of each tensor's bytes
    recipe     the recipe as a plain dict
    memory     bytes: budget, planned, workspace used, and what a method took beyond its plan
    """

    out: str
    recipe: Mapping[str, Any]
    tensors: tuple[Outcome, ...]
    checksums: Mapping[str, str]
    read_bytes: int
    written_bytes: int
    resumed_tensors: int
    memory: Mapping[str, int]
    seconds: Seconds
    versions: Mapping[str, str]

    @property
    def worst_certificate(self) -> tuple[str, float] | None:
        """The least certain solve: tensor and estimated relative error; None where nothing was solved."""
        found = [(o.name, float(o.facts["certificate"])) for o in self.tensors if "certificate" in o.facts]
        return max(found, key=lambda pair: pair[1], default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `streammerge.json` holds them."""
        worst = self.worst_certificate
        return {
            "format": FORMAT,
            "recipe": dict(self.recipe),
            "totals": self.totals(),
            "worst_certificate": {"name": worst[0], "certificate": worst[1]} if worst else None,
            "memory_bytes": dict(self.memory),
            "seconds": {**asdict(self.seconds), "computing": self.seconds.computing},
            "versions": dict(self.versions),
            "tensors": [{**asdict(o), "sha256": self.checksums[o.name]} for o in self.tensors],
        }

    def totals(self) -> dict[str, Any]:
        """The figures of `merge --json`."""
        return {
            "tensors": len(self.tensors),
            "resumed_tensors": self.resumed_tensors,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "elapsed_seconds": self.seconds.wall,
        }

    def to_json(self) -> str:
        """The text of `streammerge.json`."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def summary(self) -> str:
        """A few lines for people."""
        count = len(self.tensors)
        lines = [
            f"merged {count} tensor{'s' if count != 1 else ''} into {self.out}: "
            f"{format_bytes(self.written_bytes)} in {self.seconds.wall:.1f} s"
        ]
        if self.resumed_tensors:
            lines.append(f"{self.resumed_tensors} of them were already there")
        worst = self.worst_certificate
        if worst:
            lines.append(f"least certain solve: {quoted(worst[0])}, estimated relative error {worst[1]:.1e}")
        lost = [o for o in self.tensors if o.rounding_loss is not None and o.rounding_loss > 0.25]
        if lost:
            first = max(lost, key=lambda o: o.rounding_loss or 0.0)
            lines.append(
                f"rounding took more than a quarter of the merged change from {len(lost)} tensors, "
                f"most from {quoted(first.name)} ({first.rounding_loss:.0%}); "
                "`rounding: stochastic` or `out_dtype: float32` keeps it"
            )
        return "\n".join(lines)


def parse_report(text: str, label: str) -> dict[str, Any]:
    """A report read back. Raises OutputError when it is not one."""
    try:
        table = json.loads(text)
        sound = table["format"] == FORMAT and all(
            isinstance(tensor["name"], str) and isinstance(tensor["sha256"], str) for tensor in table["tensors"]
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise OutputError(
            f"{label} is not a report of streammerge",
            hint="Only folders that streammerge wrote can be verified.",
        )
    return dict(table)
