"""Sizes with units, and how much memory this machine lets the process have."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import psutil

from streammerge.errors import StreamMergeError, quoted

_UNITS = {"": 1, "B": 1}
_UNITS |= {unit: 1000 ** (i + 1) for i, unit in enumerate(("KB", "MB", "GB", "TB"))}
_UNITS |= {unit: 1024 ** (i + 1) for i, unit in enumerate(("KIB", "MIB", "GIB", "TIB"))}


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as "4GiB", "500 MB" or 1073741824. Raises StreamMergeError."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(size))
    number, unit = found.groups() if found else ("0", "")
    nbytes = int(Fraction(number) * _UNITS.get(unit.upper(), 0))
    if nbytes < 1:
        raise StreamMergeError(
            f"{quoted(size)} is not a size", hint="Write a number and a unit, for example `4GiB` or `500MB`."
        )
    return nbytes


def format_bytes(nbytes: float) -> str:
    """A size for people: "4.0 GiB"."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        # 1023.99 would be shown as 1024.0
        if abs(round(value, 1)) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def available_memory_bytes(
    cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Memory this process can still take: what the machine has left, cgroup limits included.

    cgroup_root  where cgroups are mounted
    membership   lists this process's group in each hierarchy
    """
    limits = [int(psutil.virtual_memory().available)]
    for controller, limit_name, used_name in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        # version 2 has one hierarchy, version 1 one for each controller
        for group in _own_groups(cgroup_root / controller, controller, membership):
            limits += _left(group, limit_name, used_name)
    return max(min(limits), 0)


def _own_groups(root: Path, controller: str, membership: Path) -> list[Path]:
    """The process's groups in a hierarchy, from `root` down to its own."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return [root]
    own = next((path for _, names, path in lines if controller in names.split(",")), "")
    parts = [part for part in own.split("/") if part]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _left(group: Path, limit_name: str, used_name: str) -> list[int]:
    """What one group leaves, if it sets a limit."""
    try:
        limit = int((group / limit_name).read_text())
        used = int((group / used_name).read_text())
    except (OSError, ValueError):
        # no such group here, or the limit is "max"
        return []
    return [limit - used + _reclaimable(group / "memory.stat")]


def _reclaimable(stat: Path) -> int:
    # clean page cache counts as used but is given back on demand
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    # version 1 counts groups below this one in the fields with `total_`, version 2 in all
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in ("inactive_file", "active_file"))
