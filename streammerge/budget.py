"""Sizes with units, and how much memory this machine lets the process have."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from streammerge.errors import StreamMergeError, quoted

_UNITS = {"": 1, "B": 1}
_UNITS |= {unit: 1000 ** (i + 1) for i, unit in enumerate(("KB", "MB", "GB", "TB"))}
_UNITS |= {unit: 1024 ** (i + 1) for i, unit in enumerate(("KIB", "MIB", "GIB", "TIB"))}


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as "4GiB", "500 MB" or 1073741824. Raises StreamMergeError."""
    if isinstance(size, int) and not isinstance(size, bool):
        number, unit = str(size), ""
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
        number, unit = found.groups() if found else ("0", "?")
    if unit.upper() not in _UNITS or float(number) <= 0:
        raise StreamMergeError(
            f"{quoted(size)} is not a size", hint="Write a number and a unit, for example `4GiB` or `500MB`."
        )
    return int(float(number) * _UNITS[unit.upper()])


def format_bytes(nbytes: float) -> str:
    """A size for people: "4.0 GiB"."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def available_memory_bytes(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process can still take: what the machine has left, cgroup limits included."""
    limits = [int(psutil.virtual_memory().available)]
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limits += _cgroup_left(cgroup_root, limit_name, used_name)
    return max(min(limits), 0)


def _cgroup_left(root: Path, limit_name: str, used_name: str) -> list[int]:
    """What each cgroup from this process's own up to `root` leaves."""
    left = []
    for group in _own_groups(root):
        try:
            limit = (group / limit_name).read_text().strip()
            used = int((group / used_name).read_text())
            reclaimable = _reclaimable(group / Path(limit_name).parent / "memory.stat")
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            left.append(int(limit) - used + reclaimable)
    return left


def _own_groups(root: Path) -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [root]
    own = next((line.split("::", 1)[1].strip("/") for line in lines if "::" in line), "")
    parts = [part for part in own.split("/") if part]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _reclaimable(stat: Path) -> int:
    # clean page cache counts as used but is given back on demand
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
