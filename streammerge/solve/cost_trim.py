"""What the methods that drop entries of the changes cost, and how likely each is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.solve.cost import BLOCK_BUFFERS, Cost
from streammerge.solve.limits import each_of

# looks that find a cut: two histograms, and one that finds where the last of equal magnitudes lies
CUT_LOOKS = 2
EQUALS_LOOK = 1
CRUMBS_LOOKS = CUT_LOOKS + EQUALS_LOOK
# and one that finds what the rest must be multiplied by
RESCALE_LOOK = 1
# of an entry, whether it is kept
_MASK_BYTES = 1


def spans(
    density: float | Sequence[float], epsilon: float | Sequence[float], experts: int
) -> list[tuple[float, float]]:
    """DELLA's smallest and largest probability of being kept, for each expert: 1 twice where nothing is dropped."""
    pairs = zip(each_of(density, experts), each_of(epsilon, experts), strict=True)
    return [(d, d) if d in (0.0, 1.0) else (d - reach, d + reach) for d, reach in pairs]


def ties_looks(density: Sequence[float], keep: str, cancelled: str, *, rescale: bool) -> int:
    """How many looks TIES takes: for the cuts, equals at the cuts, the norms, the majority of the votes."""
    cut = CUT_LOOKS + EQUALS_LOOK * (keep == "count") + RESCALE_LOOK * rescale if min(density) < 1.0 else 0
    return cut + (cancelled == "majority")


def ties(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `ties`."""
    density = each_of(parameters.get("density", 1.0), experts)
    keep, cancelled = str(parameters.get("keep", "count")), str(parameters.get("cancelled", "plus"))
    looks = ties_looks(density, keep, cancelled, rescale=bool(parameters.get("rescale", False)))
    scope = "model" if parameters.get("trim") == "model" else "tensor"
    return _elementwise(shape, experts, looks, scope=scope)


def breadcrumbs(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `breadcrumbs` and `breadcrumbs_ties`."""
    cuts = min(each_of(parameters.get("density", 1.0), experts)) < 1.0
    looks = CRUMBS_LOOKS + RESCALE_LOOK * bool(parameters.get("rescale", False))
    return _elementwise(shape, experts, looks if cuts else 0)


def dare(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of `dare_linear` and `dare_ties`."""
    drops = min(each_of(parameters.get("density", 1.0), experts)) < 1.0
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
