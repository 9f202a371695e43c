"""Which entries survive a random drop. https://arxiv.org/abs/2311.03099 (DARE)

The random words are Philox4x32-10, keyed by seed, tensor and expert and counted by the element's index
in its tensor: the mask does not depend on how the tensor was cut, on the device, or on other experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge_kernels.choice import twin
from streammerge_kernels.round import key, random_lanes

# elements drawn at a time: fewer than these cost calls, more cost cache (CPU); a GPU wants few launches
_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 22
_ALL = 1 << 32


def keep_mask(
    shape: Sequence[int],
    *,
    density: float,
    seed: int,
    name: str,
    expert: str,
    first_index: int = 0,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """Draw which entries are kept: each with probability `density`, independently.

    shape        of the mask; a run of a tensor's elements
    density      in [0, 1], to 2⁻³²: 0 keeps nothing, 1 everything
    seed, name, expert   key of the random words: the tensor's name and the expert's
    first_index  index in the whole tensor of the mask's first element: the counter
    out          [*shape] bool, contiguous, on `device`, or None for a new tensor

    Element i takes word i mod 4 of Philox block i // 4 and is kept where that is below density · 2³².
    Returns `out`.
    """
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=device) if out is None else out
    assert mask.shape == tuple(shape), f"out is {tuple(mask.shape)}, not {tuple(shape)}"
    assert mask.dtype is torch.bool, f"out is {mask.dtype}"
    assert mask.is_contiguous(), "out must be contiguous"
    below = kept_below(density)
    if (faster := twin("drop", mask, mask.numel())) is not None:
        result: Tensor = faster.keep_mask(
            shape,
            density=density,
            seed=seed,
            name=name,
            expert=expert,
            first_index=first_index,
            device=device,
            out=mask,
        )
        return result
    target, words = mask.view(-1), drop_key(seed, name, expert)
    size = _CHUNK if mask.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, target.numel(), size):
        part = target[start : start + size]
        first_count, skipped = divmod(first_index + start, 4)
        counts = -(-(skipped + part.numel()) // 4)
        lanes = random_lanes(words, first_count, counts, mask.device).view(-1)
        torch.lt(lanes[skipped : skipped + part.numel()], below, out=part)
    return mask


def kept_below(density: float) -> int:
    """The bound below which a 32-bit word means that its entry is kept."""
    assert 0.0 <= density <= 1.0, f"density is {density}, expected 0 to 1"
    return round(density * _ALL)


def drop_key(seed: int, name: str, expert: str) -> tuple[int, int]:
    """The generator's two key words; they are none of those that round the tensor's output."""
    # no name contains NUL: other names and experts do not give the same text
    return key(seed, f"drop\0{expert}\0{name}")
