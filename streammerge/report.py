"""What happened, for each tensor and in all: JSON beside the model, a summary on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from streammerge.budget import format_bytes
from streammerge.errors import OutputError, escaped, quoted

if TYPE_CHECKING:
    # it brings torch
    from streammerge.outcome import Outcome

FORMAT = 1
LARGE = 3.0
# names in a warning
_FEW = 3
# rules whose merged change is a sum of the experts', or what is left of one
_SUMS = frozenset({
    "task_arithmetic", "breadcrumbs", "breadcrumbs_ties", "wudi", "swudi", "aswudi", "tsv", "iso_c", "iso_cts",
    "knots", "svc", "fr", "resmerge", "larv",
})  # fmt: skip
_DROPS = frozenset({"dare_linear", "dare_ties", "della", "della_linear"})


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
    experts    how many models were merged
    inputs     every model that was read, in the order of `Recipe.locations`: its location and weight files
    max_shard_bytes, device  how the output was cut, and where the arithmetic ran
    processes  of several processes what each did, in the order of their ranks; the figures of memory are the first's
    memory_samples  of the process's anonymous memory beyond what it held when the merge began: seconds, bytes
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
    experts: int = 1
    inputs: tuple[Mapping[str, Any], ...] = ()
    max_shard_bytes: int | None = None
    device: str = "cpu"
    memory_samples: tuple[tuple[float, int], ...] = ()
    processes: tuple[Mapping[str, Any], ...] = ()

    @property
    def large(self) -> tuple[Outcome, ...]:
        """Tensors whose merged change is much larger than any expert's, the largest first: `growth` above a bound.

        For rules that average the bound is LARGE: a mean is never longer than its longest term, and ACTMat with a ridge
        comes to 3.3 times where it is most at risk, when experts times rows come near the columns; without one it has
        no bound there. A sum of T experts may be T times as long as one, so its bound is T where that is more, and
        √10 times as much for rules that drop at random and rescale: what is left of one entry in ten.
        """
        found = [o for o in self.tensors if o.growth is not None and o.growth > _bound(o.method, self.experts)]
        return tuple(sorted(found, key=lambda o: -(o.growth or 0.0)))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the numbers say that a person should look at."""
        found = []
        if large := self.large:
            first = ", ".join(f"{quoted(o.name)} ({o.growth:.1f}, {o.method})" for o in large[:_FEW])
            bound = min(_bound(o.method, self.experts) for o in large)
            found.append(
                f"{_tensors(len(large))} changed more than {bound:.2g} times as much as in any expert: "
                f"{first}{', …' if len(large) > _FEW else ''}; smaller weights or a larger `ridge` hold them back"
            )
        if passed := [o for o in self.tensors if o.non_finite or o.non_finite_inputs]:
            first = ", ".join(f"{quoted(o.name)} ({o.non_finite_inputs} in, {o.non_finite} out)" for o in passed[:_FEW])
            found.append(
                f"`non_finite: pass` let NaN or infinite values into {_tensors(len(passed))}: "
                f"{first}{', …' if len(passed) > _FEW else ''}"
            )
        return tuple(found)

    @property
    def worst_certificate(self) -> tuple[str, float] | None:
        """The least certain solve: tensor and estimated relative error; None where nothing was solved."""
        told = [(o.name, o.facts.get("certificate")) for o in self.tensors]
        found = [(name, float(value)) for name, value in told if isinstance(value, (int, float))]
        return max(found, key=lambda pair: pair[1], default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `streammerge.json` holds them."""
        worst = self.worst_certificate
        return {
            "format": FORMAT,
            "recipe": dict(self.recipe),
            "totals": self.totals(),
            "worst_certificate": {"name": worst[0], "certificate": worst[1]} if worst else None,
            "warnings": list(self.warnings),
            "inputs": list(self.inputs),
            "max_shard_bytes": self.max_shard_bytes,
            "device": self.device,
            "memory_bytes": dict(self.memory),
            "memory_samples": [list(sample) for sample in self.memory_samples],
            "seconds": {**asdict(self.seconds), "computing": self.seconds.computing},
            **({"processes": [dict(each) for each in self.processes]} if self.processes else {}),
            "versions": dict(self.versions),
            "tensors": [{**o.to_dict(), "sha256": self.checksums[o.name]} for o in self.tensors],
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
        """The text of `streammerge.json`, with a line for each tensor."""
        table = self.to_dict()
        # without indentation the encoder is the compiled one
        tensors = ",\n  ".join(map(json.dumps, table.pop("tensors")))
        return f'{json.dumps(table, indent=1)[:-2]},\n "tensors": [\n  {tensors}\n ]\n}}\n'

    def summary(self) -> str:
        """A few lines for people."""
        count = len(self.tensors)
        lines = [
            f"merged {_tensors(count)} into {escaped(self.out)}: "
            f"{format_bytes(self.written_bytes)} in {self.seconds.wall:.1f} s"
        ]
        if self.processes:
            taken = [each["seconds"]["wall"] for each in self.processes]
            lines.append(f"{len(taken)} processes took {min(taken):.1f} to {max(taken):.1f} s")
        if self.resumed_tensors:
            lines.append(f"{self.resumed_tensors} of them were already there")
        cut = [(float(o.facts["truncation_error"]), o.name) for o in self.tensors if "truncation_error" in o.facts]
        if cut and max(cut)[0] > 0.0:
            lines.append(
                f"cut to its rank, {quoted(max(cut)[1])} lost most of its change: {max(cut)[0]:.1%} of its norm"
            )
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
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _bound(method: str, experts: int) -> float:
    if method in _SUMS or method in _DROPS:
        return max(LARGE, float(experts)) * (math.sqrt(10.0) if method in _DROPS else 1.0)
    return LARGE


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count != 1 else ''}"


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
