"""A model as a recipe names it, opened: a folder's tensors, and what is to be read in place of some of them."""

from __future__ import annotations

from collections.abc import Callable

from streammerge.checkpoint import Checkpoint, Storage, load_checkpoint
from streammerge.fp8 import dequantised

View = Callable[[Checkpoint], Checkpoint]
"""Puts derived tensors in place of those that cannot be merged as they are stored; a model without any is unchanged."""

VIEWS: tuple[View, ...] = (dequantised,)


def open_model(storage: Storage, location: str) -> Checkpoint:
    """Read a model's headers. No tensor data is touched.

    Raises CheckpointError, naming the file, for anything that is not a sound model.
    """
    model = load_checkpoint(storage, location)
    for view in VIEWS:
        model = view(model)
    return model
