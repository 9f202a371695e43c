"""A model as a recipe names it, opened: a folder's tensors, and what is to be read in place of some of them."""

from __future__ import annotations

from collections.abc import Callable

from streammerge.adapters import AdapterConfig, adapted, is_adapter, load_adapter
from streammerge.checkpoint import Checkpoint, Storage, load_checkpoint
from streammerge.errors import CheckpointError, quoted
from streammerge.fp8 import dequantised

View = Callable[[Checkpoint], Checkpoint]
"""Puts derived tensors in place of those that cannot be merged as they are stored; a model without any is unchanged."""

VIEWS: tuple[View, ...] = (dequantised,)


def open_model(storage: Storage, location: str, base: str | None = None) -> Checkpoint:
    """Read a model's headers. No tensor data is touched.

    location  a model's folder, an adapter's, or both as BASE+ADAPTER; a folder whose own name has a `+` comes first
    base      the model that an adapter's folder alone is of; without one the adapter's config names it

    Raises CheckpointError, naming the file, for anything that is not a sound model.
    """
    pair = _base_and_adapter(storage, location)
    if pair is not None:
        return adapted(open_model(storage, pair[0], base), *load_adapter(storage, pair[1]))
    if is_adapter(storage.files(location)):
        adapter, config = load_adapter(storage, location)
        origin = _open_folder(storage, _base_named_by(storage, adapter, config)) if base in (None, location) else None
        return adapted(origin or open_model(storage, str(base)), adapter, config)
    return _open_folder(storage, location)


def _open_folder(storage: Storage, location: str) -> Checkpoint:
    model = load_checkpoint(storage, location)
    for view in VIEWS:
        model = view(model)
    return model


def _base_and_adapter(storage: Storage, location: str) -> tuple[str, str] | None:
    """The two locations of BASE+ADAPTER: at the last `+` that an adapter's folder follows, or else the last."""
    if "+" not in location or _exists(storage, location):
        return None
    ends = [end for end, letter in enumerate(location) if letter == "+" and 0 < end < len(location) - 1]
    for end in reversed(ends):
        if _exists(storage, location[end + 1 :]):
            return location[:end], location[end + 1 :]
    return (location[: ends[-1]], location[ends[-1] + 1 :]) if ends else None


def _base_named_by(storage: Storage, adapter: Checkpoint, config: AdapterConfig) -> str:
    if config.base is None or not _exists(storage, config.base) or is_adapter(storage.files(config.base)):
        named = f"it was trained on {quoted(config.base)}, which is no model's folder here" if config.base else ""
        raise CheckpointError(
            f"{quoted(adapter.location)} is an adapter, {named or 'and its config names no base'}",
            hint="Name its base too: `model: BASE+ADAPTER`, or as `base_model`.",
        )
    return config.base


def _exists(storage: Storage, location: str) -> bool:
    try:
        storage.files(location)
    except CheckpointError:
        return False
    return True
