"""Small host values on a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor of `values` [n] on `device`; the copy is queued, and its source lives until it is done."""
    # a copy from pageable memory would wait for the device; torch keeps a pinned block until its copy is through
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
