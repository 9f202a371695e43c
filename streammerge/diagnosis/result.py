"""What a diagnosis found, as numbers and as advice. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixFindings:
    """What only matrices have, read off sketches of the changes: see `sketch.sketched`.

    rows, columns    [out, in]
    peak             experts that changed it · out / in; near 1 its system is worst conditioned
    effective_ranks  of each expert's covariance C_t = D_tᵀD_t, tr(C_t)²/‖C_t‖²; None where it changed nothing
    effective_rank   of their sum A
    condition        a bound for the condition of A + λI at `actmat`'s default ridge: 1 + in/0.1 · ‖A‖/tr(A)
    overlaps         of each pair of experts, ordered as `cosines`: the cosine of C_s and C_t, 0 where they read
                     different inputs, 1 where the same ones; unrelated dense changes have out / (out + in)
    interference_mean, interference_sum  Σ_t ‖(Δ - D_t)D_tᵀ‖² over Σ_t ‖D_tD_tᵀ‖² where Δ is the experts' mean or sum
    scale            the multiple of the sum for which that is least
    conflict         what it then is: 0 where one sum serves every expert, 1 where none is better than the base
    interference_merged  what it is for each finished merge that was asked about
    """

    rows: int
    columns: int
    peak: float
    effective_ranks: tuple[float | None, ...]
    effective_rank: float
    condition: float
    overlaps: tuple[float | None, ...]
    interference_mean: float
    interference_sum: float
    scale: float
    conflict: float
    interference_merged: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found of one tensor.

    base_norm      norm of the base
    expert_norms   norm of each expert's change
    cosines        of each pair of experts' changes, ordered (0, 1), (0, 2), …, (1, 2), …; None where one is zero
    zeros          share of each expert's entries that did not change
    below_half_ulp  share of each expert's changed entries that rounding base + change to the output's dtype loses
    mean_lost      the same share of the experts' mean change
    matrix         None where it is not a matrix of a linear layer, or nobody changed it
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    base_norm: float
    expert_norms: tuple[float, ...]
    cosines: tuple[float | None, ...]
    zeros: tuple[float, ...]
    below_half_ulp: tuple[float, ...]
    mean_lost: float
    matrix: MatrixFindings | None = None

    @property
    def energy(self) -> float:
        """Σ ‖D_t‖²."""
        return sum(norm**2 for norm in self.expert_norms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A method to begin with, and why: each reason states what was measured and the rule that made it count."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A finished diagnosis.

    experts, merged   names of the models that would be merged, and of finished merges that were looked at
    tensors           in the order of reading
    left_out          tensors that a merge would copy: integers, and what the recipe keeps
    sketch_columns, seed  what the sketches of matrices were made with
    """

    base: str
    experts: tuple[str, ...]
    merged: tuple[str, ...]
    tensors: tuple[Findings, ...]
    left_out: int
    sketch_columns: int
    seed: int
    read_bytes: int
    seconds: float
    budget_bytes: int
    advice: Advice

    @property
    def matrices(self) -> list[tuple[Findings, MatrixFindings]]:
        """The matrices that somebody changed."""
        return [(found, found.matrix) for found in self.tensors if found.matrix is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `diagnose --json` prints them."""
        return {"format": FORMAT, **asdict(self)}

    def to_json(self) -> str:
        """The text of `diagnosis.json`."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def pairs(count: int) -> list[tuple[int, int]]:
    """All pairs of experts, in the order of `Findings.cosines`."""
    return [(first, second) for first in range(count) for second in range(first + 1, count)]
