"""Heat maps that are tables, and charts of lines: each can be read as numbers too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streammerge.reporting.grid import Cell, Grid
from streammerge.reporting.markup import Html, element, joined, short
from streammerge.reporting.page import scrolled
from streammerge.reporting.style import LINES, STEPS

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 220, 62, 12, 10, 30

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Scale:
    """How values become colours: evenly from `low` to `high`, or by their logarithms."""

    low: float
    high: float
    logarithmic: bool = False

    def step(self, value: float) -> int:
        """Which of the colours a value has."""
        low, high, value = (self._place(each) for each in (self.low, self.high, value))
        if high <= low:
            return 0
        return min(max(int((value - low) / (high - low) * STEPS), 0), STEPS - 1)

    def _place(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.logarithmic else value


def heat(grid: Grid, scale: Scale, shown: Format, label: str) -> Html:
    """Layers × kinds as a table of coloured numbers; what lies outside of the layers stands below it."""
    parts = []
    if grid.rows:
        head = element("tr", element("th", "layer", scope="col"), *(_kind(name) for name in grid.columns))
        body = [
            element(
                "tr",
                element("th", name, scope="row"),
                *(_heat_cell(grid.cells.get((row, column)), scale, shown) for column in range(len(grid.columns))),
            )
            for row, name in enumerate(grid.rows)
        ]
        parts.append(element("table", element("thead", head), element("tbody", *body), class_="heat"))
    if grid.outside:
        rows = [
            element("tr", element("th", short(kind), scope="row"), _heat_cell(cell, scale, shown))
            for kind, cell in grid.outside.items()
        ]
        parts.append(element("table", element("tbody", *rows), class_="heat"))
    return joined(scrolled(joined(*parts), label), _legend(scale, shown))


def _kind(name: str) -> Html:
    return element("th", short(name), scope="col")


def _heat_cell(cell: Cell | None, scale: Scale, shown: Format) -> Html:
    if cell is None:
        return element("td", "·", class_="no")
    among = "" if cell.count == 1 else f", the most of {cell.count}"
    return element("td", shown(cell.value), class_=f"q{scale.step(cell.value)}", title=f"{short(cell.name)}{among}")


def _legend(scale: Scale, shown: Format) -> Html:
    steps = (element("i", class_=f"q{step}") for step in range(STEPS))
    return element(
        "p", element("span", shown(scale.low)), *steps, element("span", shown(scale.high)), class_="scale",
        aria_hidden="true",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: its name and its points."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(
    lines: Sequence[Line],
    label: str,
    *,
    shown: Format,
    across: str,
    shown_across: Format = lambda value: f"{value:.0f}",
    limits: Sequence[tuple[str, float]] = (),
    filled: bool = False,
    in_bytes: bool = False,
) -> Html:
    """Lines over a common axis, from zero.

    label   what a reader who does not see it hears
    across  what the horizontal axis counts
    limits  names and heights of dashed rules
    filled  the area below the first line is coloured
    in_bytes  round heights are those of KiB, MiB, …
    """
    drawn = lines[: 2 * LINES]
    points = [point for line in drawn for point in line.points]
    if not points:
        return Html("")
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    most = max([*(y for _, y in points), *(height for _, height in limits)])
    unit = 1024.0 ** max(int(math.log2(max(most, 1.0)) // 10), 0) if in_bytes else 1.0
    ticks = [tick * unit for tick in _ticks(most / unit)]
    top = ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - left) / (right - left) if right > left else 0.5
        height = min(max(y / top, 0.0), 1.0)
        return (
            round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    marks = [*_grid_lines(ticks, shown), *_across(left, right, across, shown_across, place)]
    for number, line in enumerate(drawn):
        placed = [place(*point) for point in line.points]
        if filled and number == 0:
            floor = _HEIGHT - _BOTTOM
            corners = [(placed[0][0], floor), *placed, (placed[-1][0], floor)]
            marks.append(element("polygon", points=_points(corners), class_="area"))
        marks.append(element("polyline", points=_points(placed), class_=f"s{number % LINES}"))
        if len(placed) == 1:
            marks.append(element("circle", cx=placed[0][0], cy=placed[0][1], r=3, class_=f"d{number % LINES}"))
    for name, height in limits:
        y = place(left, height)[1]
        marks.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="limit"))
        marks.append(element("text", name, x=_WIDTH - _RIGHT, y=y - 4, text_anchor="end"))
    picture = element("svg", *marks, view_box=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)
    return joined(_keys(drawn, len(lines)) if len(lines) > 1 else None, picture)


def _keys(drawn: Sequence[Line], count: int) -> Html:
    keys = [
        element(
            "li",
            element(
                "svg",
                element("line", x1=0, x2=32, y1=6, y2=6, class_=f"s{number % LINES}"),
                view_box="0 0 32 12",
                aria_hidden="true",
            ),
            short(line.name),
        )
        for number, line in enumerate(drawn)
    ]
    if count > len(drawn):
        keys.append(element("li", f"and {count - len(drawn)} more, not drawn"))
    return element("ul", *keys, class_="legend")


def _grid_lines(ticks: Sequence[float], shown: Format) -> list[Html]:
    marks = []
    for tick in ticks:
        y = round(_HEIGHT - _BOTTOM - tick / ticks[-1] * (_HEIGHT - _TOP - _BOTTOM), 1)
        marks.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="axis"))
        marks.append(element("text", shown(tick), x=_LEFT - 6, y=y + 4, text_anchor="end"))
    return marks


def _across(
    left: float, right: float, name: str, shown: Format, place: Callable[[float, float], tuple[float, float]]
) -> list[Html]:
    y = _HEIGHT - _BOTTOM + 16
    ends = [(left, "start"), (right, "end")] if right > left else [(left, "middle")]
    marks = [element("text", shown(x), x=place(x, 0.0)[0], y=y, text_anchor=anchor) for x, anchor in ends]
    return [*marks, element("text", name, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=y, text_anchor="middle")]


def _ticks(most: float) -> list[float]:
    """Some round heights from zero to at least `most`."""
    if most <= 0.0:
        return [0.0, 1.0]
    rough = most / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(times * unit for times in (1, 2, 2.5, 5, 10) if times * unit >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]


def _points(placed: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in placed)


def bars(rows: Sequence[tuple[str, float, str]], label: str) -> Html:
    """Bars from one edge, as long as their values, with what each says beside it."""
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    body = []
    for name, value, told in rows:
        bar = element("rect", x=0, y=2, width=round(200 * max(value, 0.0) / most, 1), height=8, class_="bar")
        picture = element("svg", bar, view_box="0 0 200 12", aria_hidden="true")
        cells = element("td", told, class_="n"), element("td", picture, class_="b")
        body.append(element("tr", element("th", name, scope="row"), *cells))
    return scrolled(element("table", element("tbody", *body)), label)
