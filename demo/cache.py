"""Folders that are expensive to make, kept under a key of everything that decides their content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECORD = "complete.json"
MODEL = "model"
CONFIG = "config.json"


def key_of(settings: Mapping[str, Any]) -> str:
    """A short name that changes whenever any setting does."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def complete(folder: Path, settings: Mapping[str, Any], sign: str = CONFIG) -> bool:
    """Whether a folder was finished under exactly these settings, and still holds the file `sign`."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record == json.loads(json.dumps(settings)) and (folder / MODEL / sign).is_file()


def cached_model(
    root: Path, name: str, settings: Mapping[str, Any], make: Callable[[Path], None], sign: str = CONFIG
) -> tuple[Path, bool]:
    """Find a model folder, or have `make` fill it. Returns it, and whether it had to be made.

    It is made beside its final place and renamed when done, so what an interruption leaves is never found.
    """
    folder = root / f"{name}-{key_of(settings)}"
    if complete(folder, settings, sign):
        return folder / MODEL, False
    partial = folder.with_name(f"{folder.name}.partial")
    for leftover in (folder, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    (partial / MODEL).mkdir(parents=True)
    make(partial / MODEL)
    (partial / RECORD).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    os.rename(partial, folder)
    return folder / MODEL, True


def cached_json(path: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Read a small record, or have `make` compute it."""
    if path.is_file():
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found
    made = make()
    staged = path.with_suffix(".partial")
    staged.write_text(json.dumps(made, indent=2), encoding="utf-8")
    os.replace(staged, path)
    return made
