"""The rows of the GPU check: appended as they come, read back, and put into words. Loads no torch."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

NAME = "gpu.jsonl"


def append(results: Path, run: str, section: str, case: str, outcome: str, **facts: object) -> None:
    """Add one row to gpu.jsonl and say it. JSON has no word for what is not finite: it becomes text."""
    row = {
        "benchmark": "gpu",
        "run": run,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "section": section,
        "case": case,
        "outcome": outcome,
        **{name: _plain(value) for name, value in facts.items()},
    }
    with (results / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(line_of(row), flush=True)


def line_of(row: Mapping[str, object]) -> str:
    """A row for people."""
    words = [f"{row['outcome']:7}", f"{row['section']}: {row['case']}"]
    words += [str(row["way"])] if "way" in row else []
    for name, form in (
        ("seconds", "{:.4g} s"),
        ("gb_per_s", "{:.4g} GB/s"),
        ("share_of_copy", "{:.0%} of a copy"),
        ("tflop_per_s", "{:.4g} TFLOP/s"),
    ):
        words += [form.format(row[name])] if isinstance(row.get(name), float) else []
    words += [f"{row[name]:.2f} x {name[6:]}" for name in row if name.startswith("times_")]
    error = row.get("error")
    words += [f"error {error:.1e}" if isinstance(error, float) else str(error)] if error is not None else []
    return "  ".join(words)


def rows_of(results: Path, run: str, section: str) -> list[dict[str, object]]:
    """The rows that a run wrote for a section."""
    file = results / NAME
    # the last line of a run that was killed may be cut short
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in found if row["run"] == run and row["section"] == section]


def told(error: BaseException) -> str:
    """What went wrong and where, in a line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
