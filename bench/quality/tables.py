"""RESULTS.md out of the rows: every table of it, and nothing that is not in a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .ledger import ANALYSIS, EXPERTS, TERMS, ZERO_SHOT, Row
from .merges import of_table

KINDS = {"full": "full fine-tuning", "lora": "LoRA"}
OURS = "ACTMat"
SETTINGS = {
    ("encoder", "full"): "text tasks, full",
    ("encoder", "lora"): "text tasks, LoRA",
    ("language", "full"): "language model",
}
INTRODUCTION = """\
# What merges keep: the tables

Written by `python bench/run_quality.py --tables` out of the rows in `bench/results/quality.jsonl`; `README.md` beside
this file says what was trained and how it is judged.

Gain kept is the share of what the experts gained over the base, on average over tasks, that one merged model gains,
too. "Beside ACTMat" is the mean difference from the product's defaults, of the same experts; ± is the standard
deviation over seeds. Merge time and memory (anonymous, beyond what the process held before) are those of one thread
on a machine that did other things besides: an order of magnitude."""
GROUPS = {
    "ridge": "Ridge and anchor of ACTMat",
    "weights": "Weights of the experts' covariances, 1/‖D_t‖^2p",
    "pool": "Matrices that read the same input, stacked",
    "embeddings": "Embeddings, by ACTMat of everything else",
    "output": "The output's dtype",
    "adapters": "Adapters held back: a ridge (in/rank)² times as strong",
    "experts": "Number of experts",
    "ideas": "Beyond ACTMat",
    "lengths": "Every second expert trained four times as long",
}


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the whole document."""
    parts = [INTRODUCTION, *over_settings(rows), *encoder_parts(rows), *language_parts(rows)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def over_settings(rows: Sequence[Row]) -> Iterator[str]:
    """The gain that each method keeps in every setting, and on average over them, the best first."""
    wanted = [row for row in rows if row["group"] == "table" and _usual(row)]
    kept: dict[str, dict[str, list[float]]] = {}
    for row in wanted:
        share = gain_kept(row, rows)
        title = SETTINGS.get((row["setting"], row["kind"]))
        if share is not None and title:
            kept.setdefault(row["name"], {}).setdefault(title, []).append(100 * share)
    means = {
        name: [fmean(found[title]) for title in found] for name, found in kept.items() if len(found) == len(SETTINGS)
    }
    if not means:
        return
    lines = [
        [name, *(spread(kept[name][title], 0) for title in SETTINGS.values()), f"{fmean(means[name]):.0f}"]
        for name in sorted(means, key=lambda name: -fmean(means[name]))
    ]
    columns = ("gain kept, %", *SETTINGS.values(), "mean of the settings")
    yield f"## All settings\n\n{markdown(columns, lines)}"


def encoder_parts(rows: Sequence[Row]) -> Iterator[str]:
    """The sections on the sentence encoder, one table for each kind of training and group."""
    found = [row for row in rows if row["setting"] == "encoder"]
    for kind, name in KINDS.items():
        of_kind = [row for row in found if row["kind"] == kind and _usual(row)]
        yield from _main(of_kind, f"Eight text tasks, {name}")
        for group, title in GROUPS.items():
            if any(row["group"] == group for row in of_kind):
                yield f"### {title}, {name}\n\n{table(of_kind, group)}"
        if analysed := [row for row in of_kind if row["group"] == ANALYSIS]:
            yield f"### D_tᵀD_t and the inputs' second moments, {name}\n\n{likeness(analysed)}"
        if terms := [row for row in of_kind if row["group"] == TERMS]:
            yield f"### The error terms of Theorem 3.1, in degrees, {name}\n\n{error_terms(terms)}"
    for name in dict.fromkeys(_training(row) for row in found if row.get("adapters")):
        mine = [row for row in found if row.get("adapters") and _training(row) == name]
        yield f"### Adapters trained with {name}\n\n{table(mine, 'table', _order(mine))}"
    unequal = [row for row in found if row["longer"]]
    if any(row["group"] == "lengths" for row in unequal):
        yield f"### {GROUPS['lengths']}, full fine-tuning\n\n{table(unequal, 'lengths', _order(unequal))}"


def _usual(row: Row) -> bool:
    """Whether its experts were trained as the tables say, and not in a way that is looked at besides."""
    return not row["longer"] and not row.get("adapters")


def _training(row: Row) -> str:
    adapters = row["adapters"]
    if adapters["draws"] == "one":
        return "one draw of A"
    if adapters["targets"] != "all":
        return f"{adapters['targets']} alone"
    return f"a rate of {adapters['learning_rate']:g}"


def _order(rows: Sequence[Row]) -> list[str]:
    """The references first, then as the rows came."""
    return list(dict.fromkeys((ZERO_SHOT, EXPERTS, *(row["name"] for row in rows))))


def language_parts(rows: Sequence[Row]) -> Iterator[str]:
    """The sections on the language model."""
    found = [row for row in rows if row["setting"] == "language"]
    yield from _main(found, "Five kinds of text, full fine-tuning")
    for group, title in GROUPS.items():
        if any(row["group"] == group for row in found):
            yield f"### {title}, language model\n\n{table(found, group)}"
    asked = [row for row in rows if row["setting"] == "continuations"]
    yield from _main(asked, "Which of four continuations is the text's own? The same merges in the harness")


def _main(rows: Sequence[Row], title: str) -> Iterator[str]:
    order = [ZERO_SHOT, EXPERTS, *(merge.name for merge in of_table())]
    if any(row["group"] == "table" for row in rows):
        yield f"## {title}\n\n{table(rows, 'table', order)}"
        yield by_task(rows, order)


def table(rows: Sequence[Row], group: str, order: Sequence[str] | None = None) -> str:
    """The mean score, the share of the experts' gain that is kept, and what ACTMat's defaults lack, over seeds."""
    lines = []
    for name in order or _names(rows, group):
        mine = list({row["seed"]: row for row in rows if row["name"] == name}.values())
        if not mine:
            continue
        digits = 2 if _measure(mine[0]).factor == 1 else 1
        costs = [row for row in mine if "merge_cpu_seconds" in row]
        lines.append(
            [
                name if group == "table" else name.removeprefix(f"{group}: ").removeprefix("idea: "),
                spread([_score(row, _measure(row)) for row in mine], digits),
                spread([100 * kept for row in mine if (kept := gain_kept(row, rows)) is not None], 0),
                spread([gap for row in mine if (gap := beside_ours(row, rows)) is not None], digits, signed=True),
                spread([row["merge_cpu_seconds"] for row in costs], 0),
                spread([row["merge_memory_bytes"] / 2**20 for row in costs if row["merge_memory_bytes"]], 0),
                str(len(mine)),
            ]
        )
    unit = _measure(rows[0]).unit
    columns = ("", unit, "gain kept, %", f"beside {OURS}", "merge, CPU s", "memory, MiB", "seeds")
    return markdown(columns, lines)


def by_task(rows: Sequence[Row], order: Sequence[str]) -> str:
    """Each task's score, the mean over seeds."""
    tasks, lines = rows[0]["tasks"], []
    measure = _measure(rows[0])
    digits = 2 if measure.factor == 1 else 1
    for name in order:
        if mine := [row for row in rows if row["name"] == name]:
            means = [measure.factor * fmean(row[measure.key][task] for row in mine) for task in tasks]
            lines.append([name, *(f"{mean:.{digits}f}" for mean in means)])
    return markdown((measure.unit, *tasks), lines)


def likeness(rows: Sequence[Row]) -> str:
    """The cosines of `analysis.alike` by kind of matrix: the mean over layers, tasks and seeds."""
    keys = ("cosine", "root", "epochs", "identity", "others")
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        # what no expert changed has no covariance of its own
        for name, tasks in ((name, tasks) for name, tasks in row["matrices"].items() if tasks):
            kind = _kind(name)
            by_kind.setdefault(kind, []).extend(tasks.values())
            kappas = [found["kappa"] for found in tasks.values()]
            ratios.setdefault(kind, []).append(max(kappas) / min(kappas))
    lines = [
        [
            kind,
            *(f"{fmean(values):.3f}" if (values := [f[key] for f in found if f.get(key)]) else "" for key in keys),
            f"{fmean(f['rank'][0] for f in found):.0f}, {fmean(f['rank'][1] for f in found):.0f}",
            f"{fmean(ratios[kind]):.1f}",
        ]
        for kind, found in by_kind.items()
    ]
    columns = ("cosine with M of", "C", "C^½", "C by epochs", "I", "C, others' M", "ranks of C, M", "max κ / min κ")
    return markdown(columns, lines)


def error_terms(rows: Sequence[Row]) -> str:
    """The angles of `theorem.Terms` by kind of matrix: the mean over layers, tasks and seeds."""
    by_kind: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        for name, tasks in row["matrices"].items():
            by_kind.setdefault(_kind(name), []).extend(tasks.values())
    columns = ("total", "optimizer", "cross", "correlation", "drift")
    lines = [[kind, *(f"{fmean(f[key] for f in found):.0f}" for key in columns)] for kind, found in by_kind.items()]
    return markdown(("angle, °", *columns), lines)


def _kind(name: str) -> str:
    return re.sub(r".*layer\.\d+\.(.*)\.weight", r"\1", name)


def gain_kept(row: Row, rows: Sequence[Row]) -> float | None:
    """How much of what the experts gained over the base, on average over the row's tasks, it gained, too."""
    measure = _measure(row)
    low, high = (_like(row, name, rows) for name in (ZERO_SHOT, EXPERTS))
    if not low or not high:
        return None
    start, end = (_score(each, measure, row[measure.key]) for each in (low, high))
    return (_score(row, measure) - start) / (end - start) if (end - start) * measure.sign > 0 else None


def beside_ours(row: Row, rows: Sequence[Row]) -> float | None:
    """A merge's mean score less that of ACTMat with its defaults, of the same experts."""
    measure = _measure(row)
    ours = _like(row, OURS, rows)
    if not ours or row["name"] in (ZERO_SHOT, EXPERTS) or len(row[measure.key]) != len(ours[measure.key]):
        return None
    return _score(row, measure) - _score(ours, measure)


@dataclass(frozen=True, slots=True)
class _Measure:
    """What a setting is judged by: where a row has it, how it is shown, and whether more is better (1) or less (-1)."""

    key: str
    unit: str
    factor: int
    sign: int


_MEASURES = {
    "encoder": _Measure("accuracy", "accuracy, %", 100, 1),
    "language": _Measure("losses", "nats per token", 1, -1),
    "continuations": _Measure("accuracy", "accuracy, %", 100, 1),
}


def _measure(row: Row) -> _Measure:
    return _MEASURES[row["setting"]]


def _score(row: Row, measure: _Measure, tasks: Iterable[str] | None = None) -> float:
    return measure.factor * fmean(row[measure.key][task] for task in tasks or row[measure.key])


def _like(row: Row, name: str, rows: Sequence[Row]) -> Row | None:
    same = ("setting", "suite", "kind", "seed")
    found = [other for other in rows if other["name"] == name and all(other[key] == row[key] for key in same)]
    return found[-1] if found else None


def _names(rows: Sequence[Row], group: str) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows if row["group"] == group))


def spread(values: Sequence[float], digits: int, signed: bool = False) -> str:
    """A mean, with the standard deviation where there are several values."""
    if not values:
        return ""
    mean = f"{fmean(values):{'+' if signed else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *lines))
