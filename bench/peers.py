"""Time merges against mergekit, fusion-bench and the paper's formula, over sizes and numbers of experts, cold.

python bench/peers.py [--method NAME …] [--peer NAME …] [--layers N …] [--experts T …] [--repeats N]
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import child
import files
import rows
import torch
import truth
from generate import Settings, ensure
from linear_io import MERGEKIT, environment_with, mergekit_command
from llama import SIZES, Shape
from safetensors import safe_open

from streammerge.reporting.page import page, section
from streammerge.reporting.pictures import Line, chart

FUSION_BENCH = "fusion-bench==0.2.33"
PEERS = ("mergekit", "fusion-bench", "paper")
# mergekit computes in `dtype`; in bfloat16 it loses up to half of a small change
DTYPES = {"dtype": "float32", "out_dtype": "bfloat16"}
# of the change from the base, by norm: what rounding to bfloat16 leaves, and for random draws their spread
LARGEST_DIFFERENCE = 0.01
# Student's t, two-sided 95 %, by degrees of freedom
T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
FACTS = (
    "seconds",
    "cpu_seconds",
    "peak_anonymous_bytes",
    "peak_resident_bytes",
    "disk_read_bytes",
    "disk_written_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method that others have too: parameters that all take, whether it draws at random, and who has it.

    solver  of `actmat`: which formula it stands for. The paper's code has pinv's alone: `ridge` is held against its
            own formula in float64, and not against the paper's code's output
    """

    parameters: Mapping[str, float | bool | str] = field(default_factory=dict)
    random: bool = False
    peers: tuple[str, ...] = ("mergekit",)
    solver: truth.Solver | None = None


METHODS = {
    "linear": Method(parameters={"weight": 1.0}, peers=("mergekit", "fusion-bench")),
    "task_arithmetic": Method(parameters={"weight": 0.4}, peers=("mergekit", "fusion-bench")),
    "ties": Method(parameters={"weight": 1.0, "density": 0.5, "normalize": True}),
    "dare_ties": Method(parameters={"weight": 1.0, "density": 0.5}, random=True),
    "actmat": Method(peers=("paper",), solver="ridge"),
    "actmat, pinv": Method(parameters={"solver": "pinv"}, peers=("paper",), solver="pinv"),
}
# one layer of a 7B model is what the paper's formula takes a quarter of an hour for
SHAPES = SIZES | {
    "7b-layer": Shape(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=1024,
    )
}
Way = Callable[[Path], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized(Settings):
    """A set whose shape may be the one layer."""

    def shape(self) -> Shape:
        shape = SHAPES[self.size]
        return shape if self.layers is None else replace(shape, num_hidden_layers=self.layers)


def fusion_bench_python(work: Path) -> Path:
    """The Python of an environment with fusion-bench."""
    return environment_with(FUSION_BENCH, work / "fusion-bench-venv") / "python"


def timed(command: Sequence[str], out: Path, *, durable: bool) -> dict[str, float]:
    """A command, whole, and the fsync that it may leave to the system."""
    began = time.perf_counter()
    ran = child.run(command)
    if not durable:
        files.make_durable(files.weight_files([out]))
    seconds = time.perf_counter() - began
    return {"seconds": seconds} | {name: float(getattr(ran, name)) for name in FACTS if name != "seconds"}


def ways_of(given: Namespace, name: str, models: Sequence[Path]) -> dict[str, Way]:
    """Everyone who has the method, streammerge first."""
    method, (base, *experts) = METHODS[name], models
    # with a weight for all, mergekit would merge the base too
    origin = None if name == "linear" else base
    dtypes = {} if method.solver else DTYPES
    recipe = child.write_recipe(given.work / "peers.yaml", name.partition(",")[0], experts, origin, method.parameters,
                                **dtypes)  # fmt: skip
    bench, folders = rows.ROOT / "bench", [str(model.resolve()) for model in models]

    def streammerge(out: Path) -> dict[str, float]:
        command = [sys.executable, "-m", "streammerge", "merge", str(recipe), str(out), "--json"]
        return timed(command, out, durable=True)

    def mergekit(out: Path) -> dict[str, float]:
        flags = ("--quiet", "--async-write", "--out-shard-size", "500M")
        return timed([str(mergekit_command(given.work)), str(recipe), str(out), *flags], out, durable=False)

    def fusion_bench(out: Path) -> dict[str, float]:
        python, scale = str(fusion_bench_python(given.work)), str(method.parameters.get("weight", 1.0))
        words = [name, scale, str(out), *folders]
        return timed([python, str(bench / "fusion.py"), *words], out, durable=False)

    def paper(out: Path) -> dict[str, float]:
        return timed([sys.executable, str(bench / "paper.py"), str(out), *folders], out, durable=False)

    every = dict(zip(PEERS, (mergekit, fusion_bench, paper), strict=True))
    return {"streammerge": streammerge} | {peer: every[peer] for peer in method.peers if peer in given.peer}


def compare(base: Path, experts: Sequence[Path], one: Path, other: Path, method: str) -> float:
    """How far two merges are apart relative to their change: the difference's norm or, of random ones, the norms'.

    Of `ties` entries do not count whose magnitude is where an expert's trim ends: many are equal in bfloat16, and
    which of them stay is mergekit's sort's choice.
    """
    density = float(METHODS[method].parameters.get("density", 1.0))
    models = [files.tensor_places(folder) for folder in (base, one, other, *experts)]
    if models[1].keys() != models[2].keys():
        raise SystemExit(f"error: only one output has {sorted(models[1].keys() ^ models[2].keys())}")
    apart = mine = theirs = 0.0
    for name in models[1]:
        tensors = []
        for places in models[: None if method == "ties" else 3]:
            with safe_open(places[name], "pt") as file:
                tensors.append(file.get_tensor(name).float().flatten())
        origin, x, y, *changed = tensors
        for expert in changed:
            magnitudes = (expert - origin).abs()
            kept = int(density * magnitudes.numel())
            at_cut = magnitudes == magnitudes.kthvalue(magnitudes.numel() - kept + 1).values
            x = torch.where(at_cut, y, x)
        apart += float((x - y).norm()) ** 2
        mine += float((x - origin).norm()) ** 2
        theirs += float((y - origin).norm()) ** 2
    return abs(math.sqrt(mine / theirs) - 1) if METHODS[method].random else math.sqrt(apart / theirs)


def off_truth(models: Sequence[Path], out: Path, solver: truth.Solver) -> float:
    """One matrix's distance from its formula in float64, both rounded to bfloat16, relative to the change."""
    name = "model.layers.0.self_attn.q_proj.weight"
    base, *experts = (files.read_tensor(model, name) for model in models)
    wanted = (base.double() + truth.formula64(solver, truth.deltas64(base, experts))).bfloat16()
    return truth.relative_error(files.read_tensor(out, name).float() - base.float(), wanted.float() - base.float())


def differences(name: str, models: Sequence[Path], outs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """How far each peer's output is from streammerge's or, where the formulas are not one, both from their own.

    A peer that is off its own formula keeps its time: what streammerge is compared with is its code as it stands.
    """
    method, mine = METHODS[name], outs["streammerge"]
    peers = [peer for peer in outs if peer != "streammerge"]
    if method.solver == "ridge":
        own = off_truth(models, mine, "ridge")
        return {peer: {"difference": own, "peer_off_own_formula": off_truth(models, outs[peer], "pinv")}
                for peer in peers}  # fmt: skip
    return {peer: {"difference": compare(models[0], models[1:], mine, outs[peer], name)} for peer in peers}


def ratio_with_interval(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Theirs over mine, pair by pair: geometric mean and its 95 % confidence interval; without one for a single pair.

    Repeats alternate, so what slows the machine down for a while slows both of a pair.
    """
    logs = [math.log(y / x) for x, y in zip(mine, theirs, strict=True)]
    middle, pairs = mean(logs), len(logs)
    if pairs < 2:
        return math.exp(middle), None, None
    half = T95[min(pairs - 1, len(T95) - 1)] * stdev(logs) / math.sqrt(pairs)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def measure(
    given: Namespace, name: str, models: Sequence[Path]
) -> tuple[dict[str, list[dict[str, float]]], dict[str, dict[str, float]]]:
    """All runs of every way, by turns, and how far each peer's output is off."""
    inputs, ways = files.weight_files(models), ways_of(given, name, models)
    outs = {way: given.work / f"peers-{way}" for way in ways}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    apart: dict[str, dict[str, float]] = {}
    for repeat in range(given.repeats):
        for way, run in ways.items():
            shutil.rmtree(outs[way], ignore_errors=True)
            files.make_cold(inputs)
            found[way].append(run(outs[way]))
            seconds = found[way][-1]["seconds"]
            print(f"{repeat + 1}/{given.repeats} {name} by {way}: {seconds:.1f} s", file=sys.stderr)
        if repeat == 0:
            apart = differences(name, models, outs)
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)
    return found, apart


def record(
    given: Namespace,
    cell: Mapping[str, object],
    found: Mapping[str, list[dict[str, float]]],
    apart: Mapping[str, Mapping[str, float]],
) -> list[tuple[str, ...]]:
    """Append a row a way, a ratio only where outputs agree; the lines of the table."""
    lines = []
    for way, runs in found.items():
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        facts: dict[str, object] = {"size": given.size, **cell, "way": way, "repeats": len(runs), **middle}
        facts |= {"mergekit": MERGEKIT, "fusion_bench": FUSION_BENCH, "all_seconds": [run["seconds"] for run in runs]}
        shown = "-"
        if way in apart:
            facts |= apart[way]
            shown = "differs"
            if apart[way]["difference"] <= LARGEST_DIFFERENCE:
                for key in ("seconds", "cpu_seconds", "peak_anonymous_bytes", "peak_resident_bytes"):
                    pairs = [run[key] for run in found["streammerge"]], [run[key] for run in runs]
                    ratio, low, high = ratio_with_interval(*pairs)
                    facts[f"{key}_over_streammerge"] = {"ratio": ratio, "low": low, "high": high}
                    if key == "seconds":
                        shown = f"{ratio:.2f}" if low is None else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        rows.append(given.results, "peers", facts)
        label = f"{cell['method']} of {cell['experts']}, {cell['layers']} layers, by {way}"
        lines.append((label, f"{middle['seconds']:.1f}", f"{middle['cpu_seconds']:.1f}", shown,
                      rows.mib(middle["peak_anonymous_bytes"]), rows.mib(middle["peak_resident_bytes"]),
                      rows.mib(middle["disk_read_bytes"]), rows.mib(middle["disk_written_bytes"])))  # fmt: skip
    return lines


def cells_of(given: Namespace) -> list[tuple[int, int]]:
    """Layers and experts of each set: all depths with the first number of experts, then the others at the last."""
    layers, (first, *others) = given.layers or [SHAPES[given.size].num_hidden_layers], given.experts
    return [*((depth, first) for depth in layers), *((layers[-1], number) for number in others)]


def pictures(results: Path) -> None:
    """Draw the newest row of each way: time and memory against size, and against the number of experts."""
    newest: dict[tuple[object, ...], dict[str, object]] = {}
    for text in (results / "peers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        newest[row["size"], row["method"], row["way"], row["parameters"], row["experts"]] = row
    sections = []
    for size, method in sorted({(str(key[0]), str(key[1])) for key in newest}):
        here = [row for key, row in newest.items() if key[:2] == (size, method)]
        for across, held, name in (("parameters", "experts", "parameters"), ("experts", "parameters", "experts")):
            # the value of the other that has most points
            held_at = max({row[held] for row in here}, key=lambda value: sum(row[held] == value for row in here))
            along = [row for row in here if row[held] == held_at]
            if len({row[across] for row in along}) < 2:
                continue
            draw = partial(_chart, along, across, name)
            note = f"{held}: {held_at:,}"
            sections.append(section(f"{method}, {size}, against {name}", note, draw("seconds", "seconds", 1.0),
                                    draw("peak_resident_bytes", "resident GiB", 2.0**30)))  # fmt: skip
    text = page("Merges beside their peers", "Medians of the newest runs; what they say is in peers.jsonl.", *sections)
    (results / "peers.html").write_text(text, encoding="utf-8")


def _chart(along: Sequence[Mapping[str, object]], across: str, name: str, key: str, told: str, unit: float) -> object:
    lines = [
        Line(f"{way}, {told}", sorted((float(str(row[across])), float(str(row[key])) / unit)
                                      for row in along if row["way"] == way))
        for way in dict.fromkeys(str(row["way"]) for row in along)
    ]  # fmt: skip
    return chart(lines, f"{told} against {name}", shown=lambda value: f"{value:g}", across=name,
                 shown_across=lambda value: f"{value:,.0f}")  # fmt: skip


def main() -> None:
    parser = rows.arguments(__doc__, sizes=SHAPES)
    parser.add_argument("--method", choices=METHODS, action="append", help="repeatable; those of mergekit without")
    parser.add_argument("--peer", choices=PEERS, action="append", help="repeatable; all without")
    parser.add_argument("--layers", type=int, nargs="+", help="depths, the last with each number of experts")
    parser.add_argument("--experts", type=int, nargs="+", default=[3], help="the first with each depth")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    given.peer = given.peer or PEERS
    methods = given.method or [name for name, method in METHODS.items() if "mergekit" in method.peers]
    lines: list[tuple[str, ...]] = []
    for depth in dict.fromkeys(depth for depth, _ in cells_of(given)):
        own = depth == SHAPES[given.size].num_hidden_layers
        directory = given.work / (given.size if own else f"{given.size}-{depth}")
        settings = Sized(size=given.size, layers=None if own else depth)
        numbers = [number for each, number in cells_of(given) if each == depth]
        models = ensure(directory, settings, experts=max(numbers))
        for number in numbers:
            for name in methods:
                parameters = sum(settings.shape().nbytes().values()) // 2
                cell = {"method": name, "layers": depth, "experts": number, "parameters": parameters}
                lines += record(given, cell, *measure(given, name, models[: 1 + number]))
        files.make_cold(files.weight_files(models))
    columns = ("merge", "seconds", "CPU seconds", "over streammerge", "anonymous", "resident", "read", "written")
    print(rows.table(columns, lines))
    pictures(given.results)
    if red := [line[0] for line in lines if line[3] == "differs"]:
        raise SystemExit(f"error: further apart than {LARGEST_DIFFERENCE:.0%} of the change: {'; '.join(red)}")


if __name__ == "__main__":
    main()
