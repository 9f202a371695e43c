"""What the methods that drop entries of the changes cost, and which shares they accept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.errors import MergeError, quoted
from streammerge.solve.cost import BLOCK_BUFFERS, Cost

# looks that find a cut: two histograms, and one that finds where the last of equal magnitudes lies
CUT_LOOKS = 2
EQUALS_LOOK = 1
CRUMBS_LOOKS = CUT_LOOKS + EQUALS_LOOK
# and one that finds what the rest must be multiplied by
RESCALE_LOOK = 1
# of an entry, whether it is kept
_MASK_BYTES = 1


def shares(value: float | Sequence[float], experts: int, name: str = "density") -> list[float]:
    """A share for each expert. Raises MergeError for one that is not from 0 to 1; `name` is the parameter's."""
    values = [float(value)] * experts if isinstance(value, (int, float)) else [float(v) for v in value]
    for share in values:
        if not 0.0 <= share <= 1.0:
            raise MergeError(
                f"{quoted(name)} is {share:g}, expected a number from 0 to 1",
                hint="It is a share of the entries of each expert's change.",
            )
    return values


def spans(
    density: float | Sequence[float], epsilon: float | Sequence[float], experts: int
) -> list[tuple[float, float]]:
    """DELLA's smallest and largest probability of being kept, for each expert: 1 twice where nothing is dropped.

    Raises MergeError where density - epsilon or density + epsilon is no probability.
    """
    found = []
    for share, reach in zip(shares(density, experts), shares(epsilon, experts, "epsilon"), strict=True):
        if share in (0.0, 1.0):
            found.append((share, share))
            continue
        if not (share - reach > 0.0 and share + reach < 1.0):
            raise MergeError(
                f"`density` {share:g} and `epsilon` {reach:g} keep entries with probabilities from {share - reach:g} "
                f"to {share + reach:g}, expected more than 0 and less than 1",
                hint="Choose an `epsilon` less than `density` and less than 1 - `density`.",
            )
        found.append((share - reach, share + reach))
    return found


def ties_looks(density: Sequence[float], keep: str, cancelled: str, *, rescale: bool) -> int:
    """How many looks TIES takes: for the cuts, equals at the cuts, the norms, the majority of the votes."""
    cut = CUT_LOOKS + EQUALS_LOOK * (keep == "count") + RESCALE_LOOK * rescale if min(density) < 1.0 else 0
    return cut + (cancelled == "majority")


def ties(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `ties`."""
    density = shares(parameters.get("density", 1.0), experts)
    keep, cancelled = str(parameters.get("keep", "count")), str(parameters.get("cancelled", "plus"))
    looks = ties_looks(density, keep, cancelled, rescale=bool(parameters.get("rescale", False)))
    scope = "model" if parameters.get("trim") == "model" else "tensor"
    return _elementwise(shape, experts, looks, scope=scope)


def breadcrumbs(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `breadcrumbs` and `breadcrumbs_ties`."""
    shares(parameters.get("gamma", 0.01), experts, "gamma")
    cuts = min(shares(parameters.get("density", 1.0), experts)) < 1.0
    looks = CRUMBS_LOOKS + RESCALE_LOOK * bool(parameters.get("rescale", False))
    return _elementwise(shape, experts, looks if cuts else 0)


def dare(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `dare_linear` and `dare_ties`."""
    drops = min(shares(parameters.get("density", 1.0), experts)) < 1.0
    return _elementwise(shape, experts, int(drops and norm_is_kept(parameters)), kept_bytes=_MASK_BYTES)


def della(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `della` and `della_linear`."""
    drops = min(spans(parameters.get("density", 1.0), parameters.get("epsilon", 0.15), experts))[0] < 1.0
    return _elementwise(shape, experts, int(drops and norm_is_kept(parameters)), kept_bytes=_MASK_BYTES)


def norm_is_kept(parameters: Mapping[str, Any]) -> bool:
    """Whether what is left of a tensor is rescaled to its sum of magnitudes, which takes a look at all of it."""
    return bool(parameters.get("rescale", True)) and parameters.get("rescale_by", "norm") == "norm"


def _elementwise(
    shape: tuple[int, int], experts: int, looks: int, *, scope: str = "tensor", kept_bytes: int = 0
) -> Cost:
    rows, columns = shape
    return Cost(
        workspace_bytes=0,
        flops=(4 + 2 * looks) * experts * rows * columns,
        passes=1,
        looks=looks,
        block_buffers=max(BLOCK_BUFFERS, experts + 4),
        kept_bytes=kept_bytes if looks else 0,
        look_scope="model" if scope == "model" else "tensor",
    )
