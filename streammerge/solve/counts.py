"""How many experts a method takes."""

from __future__ import annotations

from streammerge.delta import Deltas
from streammerge.errors import MergeError, quoted


def expect_experts(deltas: Deltas, method: str, fewest: int, most: int | None, hint: str) -> None:
    """Raise MergeError, naming the tensor, where there are fewer or more experts than the method takes."""
    if deltas.experts >= fewest and (most is None or deltas.experts <= most):
        return
    wanted = f"{fewest}" if most == fewest else f"at least {fewest}"
    raise MergeError(f"{quoted(deltas.name)}: `{method}` merges {wanted}, found {deltas.experts} experts", hint=hint)
