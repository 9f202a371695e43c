"""The page of several merges side by side: the same pictures on common scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streammerge.reporting.facts import MergeFacts
from streammerge.reporting.grid import gridded, kind_of
from streammerge.reporting.markup import Child, Html, element, joined, number, percent, seconds, short
from streammerge.reporting.merge_page import INTERFERENCE, MEASURES, Measure, length, middle, results_of, size
from streammerge.reporting.page import folded, lines, page, section, table
from streammerge.reporting.pictures import Line, chart, heat


def comparison_page(merges: Sequence[MergeFacts]) -> str:
    """The page of several merges, as HTML; their labels must differ."""
    return page(
        f"Comparison of {len(merges)} merges",
        ", ".join(short(merge.label) for merge in merges),
        *comparison_sections(merges),
    )


def comparison_sections(merges: Sequence[MergeFacts]) -> list[Html | None]:
    """What such a page consists of, to be put into another."""
    return [
        _side_by_side(merges),
        results_of(merges),
        _warnings(merges),
        *(_compared(measure, merges) for measure in MEASURES),
        _memory(merges),
        _recipes(merges),
    ]


def _side_by_side(merges: Sequence[MergeFacts]) -> Html:
    told: list[tuple[str, Callable[[MergeFacts], Child]]] = [
        ("method", lambda merge: merge.method),
        ("experts", lambda merge: str(len(merge.experts))),
        ("tensors", lambda merge: f"{len(merge.tensors):,}"),
        ("time", lambda merge: seconds(merge.seconds.get("wall"))),
        ("of it computing", lambda merge: seconds(merge.seconds.get("computing"))),
        ("read", lambda merge: size(merge.totals.get("read_bytes"))),
        ("written", lambda merge: size(merge.totals.get("written_bytes"))),
        ("most memory seen", lambda merge: size(merge.peak_bytes)),
        ("budget", lambda merge: size(merge.memory.get("budget"))),
        ("interference, median", lambda merge: number(middle(t.interference for t in merge.matrices), 2)),
        ("length of the change, median", lambda merge: length(middle(t.norm_ratio for t in merge.matrices))),
        ("rounding loss, median", lambda merge: percent(middle(t.rounding_loss for t in merge.matrices))),
        ("worst certificate", lambda merge: number(_worst(merge), 2)),
        ("computed on", lambda merge: merge.device),
    ]
    rows: list[list[Child]] = [[name, *(tell(merge) for merge in merges)] for name, tell in told]
    return section(
        "Side by side",
        "One column for each merge; medians are over the matrices of linear layers.",
        table(["", *(short(merge.label) for merge in merges)], rows),
    )


def _worst(merge: MergeFacts) -> float | None:
    return max((tensor.certificate for tensor in merge.tensors if tensor.certificate is not None), default=None)


def _warnings(merges: Sequence[MergeFacts]) -> Html | None:
    found = [f"{short(merge.label)}: {warning}" for merge in merges for warning in merge.warnings]
    return section("Warnings", "What a person should look at.", lines(found, "warn")) if found else None


def _compared(measure: Measure, merges: Sequence[MergeFacts]) -> Html | None:
    grids = [gridded(merge.matrices, measure.value) for merge in merges]
    values = [value for grid in grids for value in grid.values]
    if not values:
        return None
    scale = measure.scale(values)
    without = [short(merge.label) for merge, grid in zip(merges, grids, strict=True) if not grid.values]
    maps = [
        element("div", element("h3", short(merge.label)), heat(grid, scale, measure.shown, merge.label))
        for merge, grid in zip(merges, grids, strict=True)
        if grid.values
    ]
    note = f"{measure.note} All on one scale." + _missing(measure, without)
    lines_of_layers = None if measure.logarithmic else _by_layer(measure, merges)
    every = element("div", *maps, class_="side")
    return section(
        measure.title, note, lines_of_layers, every if lines_of_layers is None else folded("Every matrix", every)
    )


def _missing(measure: Measure, without: Sequence[str]) -> str:
    if not without:
        return ""
    remedy = "; `streammerge diagnose --merged` measures it for any method" if measure is INTERFERENCE else ""
    return f" Not measured for {', '.join(without)}{remedy}."


def _by_layer(measure: Measure, merges: Sequence[MergeFacts]) -> Html:
    drawn = []
    for merge in merges:
        layers: dict[int, list[float]] = {}
        for tensor in merge.matrices:
            layer, value = kind_of(tensor.name)[0], measure.value(tensor)
            if layer is not None and value is not None:
                layers.setdefault(layer, []).append(value)
        points = [(float(layer), middle(found) or 0.0) for layer, found in sorted(layers.items())]
        if points:
            drawn.append(Line(merge.label, points))
    return chart(drawn, f"{measure.title}: the median of each layer", shown=measure.shown, across="layer")


def _memory(merges: Sequence[MergeFacts]) -> Html | None:
    drawn = [Line(m.label, [(second, max(held, 0.0)) for second, held in m.samples]) for m in merges if m.samples]
    if not drawn:
        return None
    picture = chart(
        drawn, "Anonymous memory over time", shown=size, across="seconds", shown_across=seconds, in_bytes=True
    )
    return section("Memory", "Anonymous memory beyond what each process held when its merge began.", picture)


def _recipes(merges: Sequence[MergeFacts]) -> Html:
    told = [folded(short(merge.label), element("pre", merge.recipe)) for merge in merges]
    return section("Recipes", "What was asked for, with every default left out.", joined(*told))
