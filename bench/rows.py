"""What every benchmark shares: its arguments, the facts of a row, where rows go, and the printed table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llama import SIZES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
WORK = ROOT / ".cache" / "bench"
PACKAGES = ("streammerge", "torch", "numpy", "safetensors", "accelerate", "transformers")


def arguments(document: str | None, sizes: Iterable[str] = tuple(SIZES), size: str = "1.1b") -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(document or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="where model sets are made")
    parser.add_argument("--size", choices=tuple(sizes), default=size, help="`tiny` tries the benchmark out")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where rows are appended")
    return parser


def append(results: Path, benchmark: str, facts: Mapping[str, object]) -> None:
    """Add one row to BENCHMARK.jsonl, with the machine, the versions, the date and the commit."""
    results.mkdir(parents=True, exist_ok=True)
    row = {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "versions": _versions(),
        "load": round(os.getloadavg()[0], 2),
        **facts,
    }
    with (results / f"{benchmark}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def table(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in line] for line in (columns, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def mib(nbytes: float) -> str:
    """Bytes as whole MiB."""
    return f"{nbytes / 2**20:.0f} MiB"


def _machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _versions() -> dict[str, str]:
    found = {package: _version(package) for package in PACKAGES}
    return {"python": sys.version.split()[0], **{k: v for k, v in found.items() if v}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "--verify", "HEAD") or "none"
    changed = git("status", "--porcelain", "--", "streammerge", "kernels")
    return f"{head}+changes" if changed else head
