"""From findings to a method to begin with: few rules, each tied to what was measured. Loads no torch.

In this order, over the matrices of linear layers, each weighed by Σ ‖D_t‖²; the first that holds names the method:

1  nobody changed a matrix                            linear: all methods agree
2  the mean's interference is at most AGREES          linear: the experts say the same
3  the best multiple of the sum leaves at most AGREES  task_arithmetic, with that weight: they do not meet
4  else                                               actmat: a weight for each input direction instead of one for all

actmat gets `pool: inputs` where a matrix that shares its input lies within PEAK of the interpolation peak, where
experts · out = in and the system is worst conditioned; `weight_exponent: 1` where one expert's change is LOUDER times
another's, as covariances grow with the square. Any method gets `rounding: stochastic` where rounding loses more than
LOSES of the mean change's entries. The thresholds are judgements: nothing here was fitted to evaluations.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from streammerge.diagnosis.result import Advice, Findings, MatrixFindings, pairs
from streammerge.errors import quoted
from streammerge.pools import input_of

AGREES = 0.05
PEAK = (0.8, 1.25)
LOUDER = 3.0
LOSES = 0.1
_SPARSE = 0.9
_OPPOSED = -0.2
_FEW = 5
_OUTSIDE = 0.5
_CAUTION = (
    "This is read off weights alone and says where experts meet, not what a merged model can do: "
    "evaluate it, and beside it a plain average."
)


def advice(tensors: Sequence[Findings], experts: Sequence[str]) -> Advice:
    """A method to begin with for what was found."""
    matrices = [(found, found.matrix) for found in tensors if found.matrix is not None]
    method, parameters, reasons = _method(matrices)
    settings: dict[str, Any] = {}
    if method == "actmat":
        for key, value, reason in (*_pooled(matrices), *_weighted(tensors, experts)):
            parameters[key] = value
            reasons.append(reason)
    lost = lost_share(tensors)
    if lost > LOSES:
        settings["rounding"] = "stochastic"
        reasons.append(
            f"rounding would lose {lost:.0%} of the entries that the experts' mean changes (more than {LOSES:.0%}): "
            "`rounding: stochastic` keeps them on average, `out_dtype: float32` exactly"
        )
    return Advice(
        method=method,
        parameters=parameters,
        settings=settings,
        reasons=tuple(reasons),
        notes=(*_notes(tensors, matrices, experts), _CAUTION),
    )


def whole_norms(tensors: Sequence[Findings]) -> list[float]:
    """Norm of each expert's change of all tensors together."""
    return [
        math.sqrt(math.fsum(norm**2 for norm in norms))
        for norms in zip(*(t.expert_norms for t in tensors), strict=True)
    ]


def whole_cosines(tensors: Sequence[Findings]) -> list[float | None]:
    """Cosine of each pair of experts' changes of all tensors together, ordered as `Findings.cosines`."""
    norms = whole_norms(tensors)
    found: list[float | None] = []
    for place, (first, second) in enumerate(pairs(len(norms))):
        product = math.fsum((t.cosines[place] or 0.0) * t.expert_norms[first] * t.expert_norms[second] for t in tensors)
        size = norms[first] * norms[second]
        found.append(product / size if size else None)
    return found


def lost_share(tensors: Sequence[Findings]) -> float:
    """Share of the experts' mean change's entries that rounding loses, over all tensors by their elements."""
    elements = [math.prod(t.shape) for t in tensors]
    return sum(t.mean_lost * n for t, n in zip(tensors, elements, strict=True)) / max(sum(elements), 1)


def at_peak(matrix: MatrixFindings) -> bool:
    """Whether experts · out is so near to in that the system without a ridge is worst conditioned."""
    return PEAK[0] <= matrix.peak <= PEAK[1]


def _method(matrices: Sequence[tuple[Findings, MatrixFindings]]) -> tuple[str, dict[str, Any], list[str]]:
    if not matrices:
        return "linear", {}, ["no expert changed a matrix of a linear layer: an average does what any method would"]
    mean = _weighed(matrices, [m.interference_mean for _, m in matrices])
    conflict = _weighed(matrices, [m.conflict for _, m in matrices])
    if mean <= AGREES:
        return (
            "linear",
            {},
            [f"the experts agree: their average leaves an interference of {mean:.2f}, at most {AGREES}"],
        )
    scale = round(statistics.median(m.scale for _, m in matrices), 2)
    if conflict <= AGREES:
        return "task_arithmetic", {"weight": scale}, [
            f"the experts hardly meet: {scale:.2f} times the sum of their changes leaves an interference of "
            f"{conflict:.2f}, at most {AGREES}; their average would leave {mean:.2f}"
        ]  # fmt: skip
    return "actmat", {}, [
        f"the experts meet on the same inputs: the best multiple of their summed changes, about {scale:.2f}, still "
        f"leaves an interference of {conflict:.2f} (more than {AGREES}), their average {mean:.2f}; `actmat` weighs "
        "each input direction by itself"
    ]  # fmt: skip


def _weighed(matrices: Sequence[tuple[Findings, MatrixFindings]], values: Sequence[float]) -> float:
    total = math.fsum(found.energy for found, _ in matrices)
    return math.fsum(found.energy / total * value for (found, _), value in zip(matrices, values, strict=True))


def _pooled(matrices: Sequence[tuple[Findings, MatrixFindings]]) -> list[tuple[str, Any, str]]:
    shared = Counter(input_of(found.name) for found, _ in matrices)
    risky = [f.name for f, m in matrices if at_peak(m) and input_of(f.name) and shared[input_of(f.name)] > 1]
    if not risky:
        return []
    reason = (
        f"{len(risky)} matrices that share their input, such as {quoted(risky[0])}, have experts · out within "
        f"{PEAK[0]} to {PEAK[1]} of in, where their own system is worst conditioned: `pool: inputs` solves them "
        "with their neighbours' rows"
    )
    return [("pool", "inputs", reason)]


def _weighted(tensors: Sequence[Findings], experts: Sequence[str]) -> list[tuple[str, Any, str]]:
    norms = whole_norms(tensors)
    changed = [norm for norm in norms if norm > 0.0]
    if len(changed) < 2 or max(changed) < LOUDER * min(changed):
        return []
    loud = experts[norms.index(max(changed))]
    reason = (
        f"the change of {quoted(loud)} is {max(changed) / min(changed):.1f} times as long as the shortest (at least "
        f"{LOUDER:g}) and its covariance counts with the square of that: `weight_exponent: 1` gives all the same say"
    )
    return [("weight_exponent", 1.0, reason)]


def _notes(
    tensors: Sequence[Findings], matrices: Sequence[tuple[Findings, MatrixFindings]], experts: Sequence[str]
) -> list[str]:
    notes = []
    for name, norm in zip(experts, whole_norms(tensors), strict=True):
        if norm == 0.0:
            notes.append(f"{quoted(name)} is the base: it changed nothing")
    for (first, second), cosine in zip(pairs(len(experts)), whole_cosines(tensors), strict=True):
        both = f"{quoted(experts[first])} and {quoted(experts[second])}"
        if cosine is not None and cosine <= _OPPOSED:
            notes.append(f"{both} pull in opposite directions: the cosine of their changes is {cosine:.2f}")
        elif cosine is not None and cosine >= 1 - AGREES:
            notes.append(f"{both} made nearly the same change (cosine {cosine:.3f}) and count twice in a mean")
    worst = sorted(matrices, key=lambda pair: (-pair[1].conflict, pair[0].name))[:_FEW]
    worst = [(found, matrix) for found, matrix in worst if matrix.conflict > AGREES]
    if worst:
        named = ", ".join(f"{quoted(found.name)} ({matrix.conflict:.2f})" for found, matrix in worst)
        notes.append(f"most conflict is to be expected in {named}")
    alone = [found.name for found, matrix in matrices if at_peak(matrix) and not input_of(found.name)]
    if alone:
        notes.append(
            f"{len(alone)} matrices that share no input, such as {quoted(alone[0])}, lie at the interpolation peak "
            f"(experts · out within {PEAK[0]} to {PEAK[1]} of in): without a ridge (`exact`, `pinv`) their merged "
            "change would be many times as long as any expert's, and a larger `ridge` holds it back"
        )
    outside = math.fsum(found.energy for found in tensors if found.matrix is None)
    total = math.fsum(found.energy for found in tensors)
    if matrices and total and outside / total > _OUTSIDE:
        notes.append(
            f"{outside / total:.0%} of the changes' squared norm lies outside of linear layers, in embeddings, norms "
            "and the like, which methods by matrix average"
        )
    changed = [found for found in tensors if found.energy]
    if changed and all(min(found.zeros) >= _SPARSE for found in changed):
        notes.append(
            f"every expert left at least {_SPARSE:.0%} of each tensor's entries as they were: changes are sparse"
        )
    return notes
