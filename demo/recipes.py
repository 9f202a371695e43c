"""How the demo merges its experts by each method: the three of the table, or all that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge import methods

SHOWN = ("average", "task_arithmetic", "actmat")
# one expert beside the base, or two experts: these rules know no third
ONE_EXPERT = ("slerp", "nearswap", "arcee_fusion", "passthrough")
TWO_EXPERTS = ("nuslerp",)
# where the defaults merge nothing away
PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.85},
    "breadcrumbs_ties": {"density": 0.85},
    "sce": {"select_topk": 0.5},
    "knots": {"rule": "ties", "rule_parameters": {"density": 0.2}},
    "svc": {"rule": "task_arithmetic"},
    "larv": {"rule": "actmat"},
}


def names(wanted: str) -> list[str]:
    """The merges that "actmat,ties" or "all" ask for; "average" is `linear`. Raises SystemExit for an unknown one."""
    every = [*SHOWN, *(name for name in methods.names() if name not in ("linear", *SHOWN))]
    asked = every if wanted == "all" else [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in asked if name not in every]
    if unknown or not asked:
        raise SystemExit(f"error: no method {', '.join(unknown) or 'named'}\n\nhint: Take of: all, {', '.join(every)}.")
    return asked


def method_of(name: str) -> methods.Method:
    """The method behind a merge of the demo."""
    return methods.describe("linear" if name == "average" else name)


def recipe(name: str, base: Path, experts: Sequence[Path], data: Sequence[Path]) -> dict[str, Any]:
    """One merge, in bfloat16.

    data  for each expert the folder that `streammerge capture` made of it, for methods that need one
    """
    method = method_of(name)
    count = 1 if name in ONE_EXPERT else 2 if name in TWO_EXPERTS else len(experts)
    models = [{"model": str(expert)} for expert in experts[:count]]
    for model, folder in zip(models, data, strict=False):
        model[str(method.beside)] = str(folder / "fisher" if method.beside == "fisher" else folder)
    parameters = dict(PARAMETERS.get(name, {}))
    return {
        "merge_method": method.name,
        "base_model": str(base),
        "models": models,
        **({"parameters": parameters} if parameters else {}),
        "dtype": "bfloat16",
    }
