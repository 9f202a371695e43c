"""Merge language-model checkpoints that do not fit in memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from streammerge.api import batch, capture, diagnose, evaluate, extract, inspect, merge, plan, verify
from streammerge.errors import StreamMergeError
from streammerge.recipe import Recipe

if TYPE_CHECKING:
    from streammerge.plan import Plan
    from streammerge.report import Report

__version__ = "0.1.0"
__all__ = [
    "Plan",
    "Recipe",
    "Report",
    "StreamMergeError",
    "batch",
    "capture",
    "diagnose",
    "evaluate",
    "extract",
    "inspect",
    "merge",
    "plan",
    "verify",
]

_LAZY = {"Plan": "streammerge.plan", "Report": "streammerge.report"}


def __getattr__(name: str) -> Any:
    # Report brings torch with it, which `plan` and `--help` must not wait for
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module `streammerge` has no attribute `{name}`")
