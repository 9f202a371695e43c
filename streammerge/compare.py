"""How two checkpoints differ in names and shapes, all of it at once."""

from __future__ import annotations

from streammerge.checkpoint import Checkpoint
from streammerge.errors import quoted


def differences(reference: Checkpoint, other: Checkpoint, reference_name: str, other_name: str) -> list[str]:
    """One line for each tensor that is missing, extra or of another shape or kind in `other`."""
    lines = []
    for name, entry in reference.tensors.items():
        found = other.tensors.get(name)
        if found is None:
            lines.append(f"{quoted(name)} is in {quoted(reference_name)} but not in {quoted(other_name)}")
        elif found.shape != entry.shape:
            lines.append(
                f"{quoted(name)} is {list(entry.shape)} in {quoted(reference_name)} "
                f"but {list(found.shape)} in {quoted(other_name)}"
            )
        elif found.is_float != entry.is_float or (not found.is_float and found.dtype != entry.dtype):
            lines.append(
                f"{quoted(name)} is {entry.dtype} in {quoted(reference_name)} but {found.dtype} in {quoted(other_name)}"
            )
    lines += [
        f"{quoted(name)} is in {quoted(other_name)} but not in {quoted(reference_name)}"
        for name in other.tensors.keys() - reference.tensors.keys()
    ]
    return sorted(lines)
