"""The page of a diagnosis: advice first, then where experts meet, how far they went, and what rounding would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import yaml

from streammerge.budget import format_bytes
from streammerge.diagnosis.advice import lost_share, whole_cosines, whole_norms
from streammerge.diagnosis.result import Diagnosis, Findings, MatrixFindings, pairs
from streammerge.reporting.grid import gridded
from streammerge.reporting.markup import Child, Html, element, number, percent, seconds, short
from streammerge.reporting.merge_page import MOST_TENSORS, norms_by_layer
from streammerge.reporting.page import facts, folded, lines, page, section, table
from streammerge.reporting.pictures import Format, Scale, heat


@dataclass(frozen=True, slots=True)
class _Picture:
    title: str
    note: str
    value: Callable[[Findings], float | None]
    shown: Format
    high: float | None = None
    logarithmic: bool = False


def _of(value: Callable[[MatrixFindings], float | None]) -> Callable[[Findings], float | None]:
    return lambda found: None if found.matrix is None else value(found.matrix)


def _two_places(value: float) -> str:
    return f"{value:.2f}"


_PICTURES = (
    _Picture(
        "Conflict",
        "What the best multiple of the experts' sum gets wrong of what they do to their own inputs: 0 where one sum "
        "serves all, 1 where none is better than the base. High numbers are where methods will differ.",
        _of(lambda matrix: matrix.conflict),
        _two_places,
        high=1.0,
    ),
    _Picture(
        "Interference of a plain average",
        "The same for the mean of the changes: what `linear` would get wrong.",
        _of(lambda matrix: matrix.interference_mean),
        _two_places,
        high=1.0,
    ),
    _Picture(
        "Shared inputs",
        "The largest overlap of two experts' input covariances: 0 where they read different directions, 1 where the "
        "same; unrelated dense changes have out / (out + in).",
        _of(lambda matrix: max((overlap for overlap in matrix.overlaps if overlap is not None), default=None)),
        _two_places,
        high=1.0,
    ),
    _Picture(
        "Effective rank of the changes",
        "Over how many input directions the changes spread together, tr(A)²/‖A‖² for A = Σ DᵀD.",
        _of(lambda matrix: matrix.effective_rank),
        lambda value: f"{value:.0f}" if value >= 10 else f"{value:.1f}",
    ),
    _Picture(
        "Distance from the interpolation peak",
        "Experts · out over in: near 1 a solution without a ridge is many times as long as any expert's change.",
        _of(lambda matrix: matrix.peak),
        lambda value: number(value, 2),
    ),
    _Picture(
        "Lost to rounding",
        "Share of the entries that the experts' mean changes which vanish when base + mean is rounded to the output's "
        "dtype.",
        lambda found: found.mean_lost,
        percent,
    ),
)


def diagnosis_page(diagnosis: Diagnosis) -> str:
    """The page of a diagnosis, as HTML."""
    return page(
        "Diagnosis before merging",
        f"{', '.join(short(name) for name in diagnosis.experts)} onto {short(diagnosis.base)}",
        _advice(diagnosis),
        _overview(diagnosis),
        _pairs(diagnosis),
        *(_drawn(picture, diagnosis) for picture in _PICTURES),
        *(_merged(diagnosis, place, name) for place, name in enumerate(diagnosis.merged)),
        norms_by_layer([(f.name, f.base_norm, f.expert_norms) for f, _ in diagnosis.matrices], diagnosis.experts),
        _experts(diagnosis),
        _every_matrix(diagnosis),
    )


def _advice(diagnosis: Diagnosis) -> Html:
    told = diagnosis.advice
    recipe = {"merge_method": told.method, **({"parameters": dict(told.parameters)} if told.parameters else {})}
    text = yaml.safe_dump({**recipe, **told.settings}, sort_keys=False)
    return section(
        f"Begin with {told.method}",
        "A suggestion by a few written rules, each with what was measured; not a promise.",
        element("pre", text),
        lines(list(told.reasons)),
        element("h3", "Beside that"),
        lines(list(told.notes)),
    )


def _overview(diagnosis: Diagnosis) -> Html:
    return section(
        "At a glance",
        None,
        facts([
            ("Tensors looked at", f"{len(diagnosis.tensors):,}"),
            ("Left out, as copies", f"{diagnosis.left_out:,}"),
            ("Read", format_bytes(diagnosis.read_bytes)),
            ("Time", seconds(diagnosis.seconds)),
            ("Budget", format_bytes(diagnosis.budget_bytes)),
            ("Mean lost to rounding", percent(lost_share(diagnosis.tensors))),
        ]),
    )  # fmt: skip


def _pairs(diagnosis: Diagnosis) -> Html | None:
    count = len(diagnosis.experts)
    if count < 2:
        return None
    cosines = dict(zip(pairs(count), whole_cosines(diagnosis.tensors), strict=True))
    rows: list[list[Child]] = []
    for first, name in enumerate(diagnosis.experts):
        row: list[Child] = [short(name)]
        for second in range(count):
            pair = (min(first, second), max(first, second))
            row.append("1" if first == second else number(cosines[pair], 2))
        rows.append(row)
    head = ["cosine", *(short(name) for name in diagnosis.experts)]
    return section(
        "How alike the experts are",
        "The cosine of each pair's changes over the whole model: 0 is unrelated, negative is opposed.",
        table(head, rows),
    )


def _drawn(picture: _Picture, diagnosis: Diagnosis) -> Html | None:
    tensors = [found for found, _ in diagnosis.matrices]
    grid = gridded(tensors, picture.value)
    if not grid.values:
        return None
    high = max([picture.high or 0.0, *grid.values])
    return section(picture.title, picture.note, heat(grid, Scale(0.0, high), picture.shown, picture.title))


def _merged(diagnosis: Diagnosis, place: int, name: str) -> Html:
    grid = gridded([found for found, _ in diagnosis.matrices], _of(lambda matrix: matrix.interference_merged[place]))
    high = max([1.0, *(value for _, matrix in diagnosis.matrices for value in matrix.interference_merged)])
    return section(
        f"Interference of {short(name)}",
        "What this finished merge gets wrong of what the experts do to their own inputs, on the scale of the others.",
        heat(grid, Scale(0.0, high), _two_places, name),
    )


def _experts(diagnosis: Diagnosis) -> Html:
    norms = whole_norms(diagnosis.tensors)
    base = sum(found.base_norm**2 for found in diagnosis.tensors) ** 0.5
    rows: list[list[Child]] = []
    for index, name in enumerate(diagnosis.experts):
        rows.append([
            short(name),
            percent(norms[index] / base if base else None),
            percent(_share(diagnosis.tensors, [found.zeros[index] for found in diagnosis.tensors])),
            percent(_share(diagnosis.tensors, [found.below_half_ulp[index] for found in diagnosis.tensors])),
        ])  # fmt: skip
    return section(
        "The experts",
        "How long each change is beside the base, how much of it is exactly zero, and how many of its entries are so "
        "small that the output's dtype cannot hold them on top of the base.",
        table(["expert", "change / base", "unchanged entries", "entries below ½ ulp"], rows),
    )


def _share(tensors: Sequence[Findings], values: Sequence[float]) -> float:
    elements = [_elements(found) for found in tensors]
    return sum(value * count for value, count in zip(values, elements, strict=True)) / max(sum(elements), 1)


def _elements(found: Findings) -> int:
    count = 1
    for side in found.shape:
        count *= side
    return count


def _every_matrix(diagnosis: Diagnosis) -> Html | None:
    worst = sorted(diagnosis.matrices, key=lambda pair: (-pair[1].conflict, pair[0].name))
    if not worst:
        return None
    rows: list[list[Child]] = [
        [
            short(found.name),
            number(matrix.conflict, 2),
            number(matrix.interference_mean, 2),
            number(matrix.interference_sum, 2),
            number(matrix.scale, 2),
            number(matrix.peak, 2),
            number(matrix.condition, 2),
        ]
        for found, matrix in worst[:MOST_TENSORS]
    ]
    head = [
        "matrix",
        "conflict",
        "of the mean",
        "of the sum",
        "best multiple",
        "experts · out / in",
        "condition at most",
    ]
    return section(
        "Every matrix" if len(rows) == len(worst) else f"{len(rows)} of {len(worst):,} matrices",
        "Those in most conflict first; the condition is a bound at `actmat`'s default ridge.",
        folded(f"Show {len(rows):,}", table(head, rows)),
    )
