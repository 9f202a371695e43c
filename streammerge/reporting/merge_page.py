"""The page of one merge: what it cost, what it changed, where experts stood in each other's way."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from streammerge.budget import format_bytes
from streammerge.reporting.facts import MergeFacts, TensorFacts
from streammerge.reporting.grid import gridded, kind_of, labels
from streammerge.reporting.markup import Child, Html, element, number, percent, seconds, short
from streammerge.reporting.page import facts, folded, lines, page, section, table
from streammerge.reporting.pictures import Format, Line, Scale, bars, chart, heat

# a table of more tensors than that is no table to read: the rest is in streammerge.json
MOST_TENSORS = 400
_MOST_RESULTS, _MOST_KINDS = 200, 40
_LEAST_CERTIFICATE, _PROMISED_CERTIFICATE = 1e-8, 1e-3


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that pages draw of every matrix.

    note        says what to see in its picture
    whole       the scale goes to 1 at least; else to the largest value
    logarithmic  the values are certificates
    """

    title: str
    note: str
    value: Callable[[TensorFacts], float | None]
    shown: Format
    whole: bool = False
    logarithmic: bool = False

    def scale(self, values: Sequence[float]) -> Scale:
        """The scale of all these values."""
        if self.logarithmic:
            # up to what a solver promises: the colours of a sound merge are faint
            return Scale(_LEAST_CERTIFICATE, max([_PROMISED_CERTIFICATE, *values]), logarithmic=True)
        if self.whole:
            return Scale(0.0, max([1.0, *values]) if self.shown is not percent else max([*values, 0.01]))
        return Scale(0.0, max(values))


def length(ratio: float | None) -> str:
    """The length of a merged change beside the experts'; a dash for none."""
    return "–" if ratio is None else f"{ratio:.2f}" if ratio < 10.0 else number(ratio, 2)


INTERFERENCE = Measure(
    "Interference",
    "How much of what the experts' changes do to their own inputs the merge gets wrong, Σ‖(Δ − D)Dᵀ‖² over "
    "Σ‖DDᵀ‖²: 0 where every expert is served as if alone, 1 where the base would do as well. High numbers are "
    "where experts want different things of the same inputs. Estimated from eight rows of each matrix.",
    lambda tensor: tensor.interference,
    lambda value: f"{value:.2f}",
    whole=True,
)
MEASURES = (
    INTERFERENCE,
    Measure(
        "Length of the merged change",
        "‖Δ‖ over the experts' mean ‖D‖: 1 is as long as an expert's, less is what averaging takes, much more "
        "deserves a look.",
        lambda tensor: tensor.norm_ratio,
        length,
        whole=True,
    ),
    Measure(
        "Effective rank of the changes",
        "Over how many input directions the experts' changes spread together, tr(A)²/‖A‖² for A = Σ DᵀD: a small "
        "number says that few directions carry nearly all of it.",
        lambda tensor: tensor.effective_rank,
        lambda value: f"{value:.0f}" if value >= 10 else f"{value:.1f}",
    ),
    Measure(
        "Rounding loss",
        "Norm of what rounding to the output's dtype took, over the norm of the merged change: where it is high, "
        "`rounding: stochastic` or `out_dtype: float32` would keep more.",
        lambda tensor: tensor.rounding_loss,
        percent,
        whole=True,
    ),
    Measure(
        "Certificates",
        "Each solve's estimate of its own relative error, by its logarithm: below 10⁻³ everywhere is as promised.",
        lambda tensor: tensor.certificate,
        lambda value: f"{value:.0e}".replace("e-0", "e-") if value else "0",
        logarithmic=True,
    ),
)


def merge_page(merge: MergeFacts) -> str:
    """The page of one merge, as HTML."""
    return page(
        f"Merge report: {short(merge.label)}",
        _lead(merge),
        _overview(merge),
        warnings_of(merge),
        results_of([merge]),
        *(_measured(measure, merge) for measure in MEASURES),
        _norms(merge),
        _time(merge),
        memory_of(merge),
        _kinds(merge),
        _recipe(merge),
        _every_tensor(merge),
    )


def _recipe(merge: MergeFacts) -> Html:
    versions = ", ".join(f"{name} {version}" for name, version in merge.versions.items())
    by = f" Merged with {versions}." if versions else ""
    return section("Recipe", f"What was asked for, with every default left out.{by}", element("pre", merge.recipe))


def _lead(merge: MergeFacts) -> str:
    return f"{merge.method} of {', '.join(short(name) for name in merge.experts) or 'unnamed models'}"


def _overview(merge: MergeFacts) -> Html:
    told: list[tuple[str, Child]] = [
        ("Tensors", f"{len(merge.tensors):,}"),
        ("Read", size(merge.totals.get("read_bytes"))),
        ("Written", size(merge.totals.get("written_bytes"))),
        ("Time", seconds(merge.seconds.get("wall"))),
        ("Most memory seen", size(merge.peak_bytes)),
        ("Budget", size(merge.memory.get("budget"))),
        ("Computed on", merge.device),
    ]
    if resumed := merge.totals.get("resumed_tensors"):
        told.insert(1, ("Of an earlier run", f"{resumed:,.0f}"))
    return section("At a glance", None, facts(told))


def warnings_of(merge: MergeFacts) -> Html | None:
    """What the merge warned of, and which solves fell back to something slower; None where all went well."""
    found = list(merge.warnings)
    escalated = [tensor for tensor in merge.tensors if tensor.escalation]
    if escalated:
        first = escalated[0]
        found.append(f"{len(escalated)} solves went on in {first.escalation}, the first of them {short(first.name)}")
    return section("Warnings", "What a person should look at.", lines(found, "warn")) if found else None


def results_of(merges: Sequence[MergeFacts]) -> Html | None:
    """Results of evaluations that lie in the folders, side by side; None where there are none."""
    asked = dict.fromkeys(
        (task, metric) for merge in merges for task, metrics in merge.results.items() for metric in metrics
    )
    if not asked:
        return None
    one = len(merges) == 1
    rows: list[list[Child]] = [
        [short(task), short(metric), *(number(merge.results.get(task, {}).get(metric), 4) for merge in merges)]
        for task, metric in list(asked)[:_MOST_RESULTS]
    ]
    more = f" The first {_MOST_RESULTS} of {len(asked):,}." if len(asked) > _MOST_RESULTS else ""
    head = ["task", "metric", *(["value"] if one else [short(merge.label) for merge in merges])]
    return section(
        "Results",
        (
            "What evaluations measured, as the folder's `results*.json` say."
            if one
            else "What evaluations measured of each, task by task; compare along a row."
        )
        + more,
        table(head, rows, numeric=2),
    )


def _measured(measure: Measure, merge: MergeFacts) -> Html | None:
    grid = gridded(merge.matrices, measure.value)
    if not grid.values:
        return None
    return section(measure.title, measure.note, heat(grid, measure.scale(grid.values), measure.shown, measure.title))


def _norms(merge: MergeFacts) -> Html | None:
    count = max((len(tensor.expert_norms) for tensor in merge.tensors), default=0)
    names = [*merge.experts, *(f"expert {number + 1}" for number in range(len(merge.experts), count))]
    return norms_by_layer([(tensor.name, tensor.base_norm, tensor.expert_norms) for tensor in merge.matrices], names)


def norms_by_layer(
    tensors: Sequence[tuple[str, float | None, Sequence[float | None]]], names: Sequence[str]
) -> Html | None:
    """Each expert's change beside the base, layer by layer; `tensors` are names, base norms and experts' norms."""
    squares: dict[int, tuple[float, list[float]]] = {}
    for name, base, norms in tensors:
        layer, _ = kind_of(name)
        if layer is None or not base or not norms or None in norms:
            continue
        total, each = squares.setdefault(layer, (0.0, [0.0] * len(norms)))
        if len(each) == len(norms):
            squares[layer] = total + base**2, [s + (norm or 0.0) ** 2 for s, norm in zip(each, norms, strict=True)]
    if not squares:
        return None
    count = min(len(each) for _, each in squares.values())
    found = [
        Line(
            names[expert] if expert < len(names) else f"expert {expert + 1}",
            [(layer, math.sqrt(each[expert] / total)) for layer, (total, each) in sorted(squares.items())],
        )
        for expert in range(count)
    ]
    picture = chart(found, "Each expert's change over the base's norm, by layer", shown=percent, across="layer")
    rows: list[list[Child]] = [
        [str(layer), *(percent(math.sqrt(each[expert] / total)) for expert in range(count))]
        for layer, (total, each) in sorted(squares.items())
    ]
    return section(
        "How far each expert went",
        "The norm of each expert's change over the base's, of all matrices of a layer: an expert far above the others "
        "has more say in what is weighed by size.",
        picture,
        folded("The same as numbers", table(["layer", *(line.name for line in found)], rows)),
    )


def _time(merge: MergeFacts) -> Html | None:
    wall = merge.seconds.get("wall")
    if wall is None:
        return None
    told = [
        ("computing", "computing"),
        ("waiting for input", "waiting_for_input"),
        ("waiting for output", "waiting_for_output"),
        ("reading, meanwhile", "reading"),
        ("writing, meanwhile", "writing"),
    ]
    rows = [(name, merge.seconds.get(key) or 0.0, seconds(merge.seconds.get(key))) for name, key in told]
    return section(
        "Time",
        f"The first three add up to {seconds(wall)}; reading and writing go on meanwhile, so a merge that waits little "
        "is as fast as its arithmetic.",
        bars(rows, "Time"),
    )


def memory_of(merge: MergeFacts) -> Html | None:
    """Anonymous memory over time, beside the plan and the budget."""
    if not merge.samples:
        return None
    budget, planned = merge.memory.get("budget"), merge.memory.get("planned")
    most = merge.peak_bytes or 0.0
    limits = [] if planned is None else [(f"planned {format_bytes(planned)}", planned)]
    # a budget many times as large would leave nothing to see
    if budget is not None and budget != planned and budget <= 4 * max(most, planned or 0.0):
        limits.append((f"budget {format_bytes(budget)}", budget))
    label = f"Anonymous memory over time, at most {format_bytes(most)}"
    picture = chart(
        [Line(merge.label, [(second, max(held, 0.0)) for second, held in merge.samples])],
        label,
        shown=format_bytes,
        across="seconds",
        shown_across=seconds,
        limits=limits,
        filled=True,
        in_bytes=True,
    )
    under = f", under the budget of {format_bytes(budget)}" if budget is not None and most <= budget else ""
    return section(
        "Memory",
        f"Anonymous memory beyond what the process held when the merge began: at most {format_bytes(most)}{under}.",
        picture,
    )


def _kinds(merge: MergeFacts) -> Html:
    groups: dict[tuple[str, str], list[TensorFacts]] = {}
    for tensor in merge.tensors:
        groups.setdefault((kind_of(tensor.name)[1], tensor.method), []).append(tensor)
    largest = sorted(groups.items(), key=lambda group: -sum(tensor.seconds or 0.0 for tensor in group[1]))
    few = list(groups) if len(groups) <= _MOST_KINDS else []
    names = dict(zip(few, labels([kind for kind, _ in few]), strict=True))
    rows: list[list[Child]] = [
        [
            short(names.get((kind, method), kind)),
            method,
            f"{len(tensors):,}",
            length(middle(tensor.norm_ratio for tensor in tensors)),
            percent(middle(tensor.changed for tensor in tensors)),
            percent(max((t.rounding_loss for t in tensors if t.rounding_loss is not None), default=None)),
            seconds(sum(tensor.seconds or 0.0 for tensor in tensors)),
        ]
        for (kind, method), tensors in largest[:_MOST_KINDS]
    ]
    rest = len(largest) - len(rows)
    return section(
        "Kinds of tensors",
        "Tensors of one kind over all layers, the slowest first"
        + (f"; {rest} further kinds are in streammerge.json." if rest else "."),
        table(["kind", "method", "tensors", "length", "changed", "worst rounding loss", "time"], rows, numeric=2),
    )


def _every_tensor(merge: MergeFacts) -> Html:
    shown = merge.tensors
    title, order = "Every tensor", "In the order of merging."
    if len(shown) > MOST_TENSORS:
        shown = tuple(sorted(shown, key=lambda t: (t.growth or 0.0, t.name), reverse=True)[:MOST_TENSORS])
        title = f"{MOST_TENSORS} of {len(merge.tensors):,} tensors"
        order = "Those that changed most beside the experts; the rest is in streammerge.json."
    rows: list[list[Child]] = [
        [
            short(tensor.name),
            tensor.method,
            number(tensor.interference, 2),
            length(tensor.norm_ratio),
            percent(tensor.rounding_loss),
            number(tensor.certificate, 2),
            seconds(tensor.seconds),
        ]
        for tensor in shown
    ]
    head = ["tensor", "method", "interference", "length", "rounding loss", "certificate", "time"]
    return section(title, order, folded(f"Show {len(shown):,}", table(head, rows, numeric=2)))


def size(nbytes: float | None) -> str:
    """A size for people; a dash for none."""
    return "–" if nbytes is None else format_bytes(nbytes)


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are numbers."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
