"""How near D_tᵀD_t comes to the inputs that an expert really sees, matrix by matrix: the paper's Figure 6."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .encoder import EPOCHS


def opened(folder: Path) -> Callable[[str], Tensor]:
    """Tensors of a folder with one file of weights, in float64, by name."""
    (file,) = folder.glob("*.safetensors")

    def get(name: str) -> Tensor:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name).double()

    return get


def names_of(folder: Path) -> list[str]:
    """The tensors of a folder with one file of weights."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return sorted(tensors.keys())


def alike(base: Path, experts: Mapping[str, Path], moments: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """For each matrix that a moment is known of, and each task, how much alike C = DᵀD and the inputs' moment M are.

    cosine    of C and M, ⟨C, M⟩/‖C‖‖M‖
    identity  of the identity and M: what knowing nothing would give
    root      of C^½ and M
    epochs    of ΣDₑᵀDₑ and M, Dₑ the change of one epoch; where the epochs were kept
    others    of C and the other tasks' moments, the mean
    kappa     tr C / tr M
    rank      the effective ranks of C and of M, tr²/‖·‖²
    """
    get_base = opened(base)
    get = {task: opened(folder) for task, folder in experts.items()}
    measured = {task: opened(folder) for task, folder in moments.items()}
    epochs = {task: _epochs(folder) for task, folder in experts.items()}
    found: dict[str, dict[str, Any]] = {}
    for name in names_of(next(iter(moments.values()))):
        weights = get_base(name)
        inputs = {task: measured[task](name) for task in experts}
        found[name] = {}
        for task in experts:
            expert = get[task](name)
            change = expert - weights
            if not change.any():
                continue
            gram, moment = change.T @ change, inputs[task]
            others = [cosine(gram, other) for each, other in inputs.items() if each != task]
            found[name][task] = {
                "cosine": cosine(gram, moment),
                "identity": cosine(torch.eye(len(gram), dtype=torch.float64), moment),
                "root": cosine(root(gram), moment),
                **_by_epoch(weights, [*(epoch[name].double() for epoch in epochs[task]), expert], moment),
                "others": sum(others) / len(others) if others else None,
                "kappa": float(gram.trace() / moment.trace()),
                "rank": [effective_rank(gram), effective_rank(moment)],
            }
    return found


def _epochs(expert: Path) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted((expert / EPOCHS).glob("*.safetensors"))]


def _by_epoch(base: Tensor, ends: Sequence[Tensor], moment: Tensor) -> dict[str, float]:
    if len(ends) < 2:
        return {}
    steps = [end - start for start, end in zip((base, *ends), ends, strict=False)]
    return {"epochs": cosine(torch.stack([step.T @ step for step in steps]).sum(0), moment)}


def cosine(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩/‖a‖‖b‖."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def root(gram: Tensor) -> Tensor:
    """The positive semidefinite square root."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T


def effective_rank(gram: Tensor) -> float:
    """tr²/‖·‖²."""
    return float(gram.trace().square() / gram.square().sum())
