"""Time `linear` of three experts against dd and against mergekit, cold, in one run.

python bench/linear_io.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import child
import files
import rows
import torch
from generate import Settings, ensure
from memory import imports_only
from safetensors import safe_open
from torch import Tensor

MERGEKIT = "mergekit==0.1.5"
# its flags that could matter for safetensors on a CPU; --lazy-unpickle is about .bin files and
# --low-cpu-memory about a second device. Small shards let it write while it merges.
MERGEKIT_WAYS = {
    "mergekit": (),
    "mergekit async": ("--async-write", "--out-shard-size", "500M"),
}


def environment_with(package: str, folder: Path) -> Path:
    """The programs of an environment that has a package, made once, with the versions that we are tested with."""
    ready = folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        # torch first and pinned: asked for by others alone, a build with CUDA would come along
        for each in ("torch", package):
            subprocess.run([*pip, each, "-c", str(rows.ROOT / "constraints.txt")], check=True)
        ready.touch()
    return folder / "bin"


def mergekit_command(work: Path) -> Path:
    """mergekit in an environment of its own."""
    return (environment_with(MERGEKIT, work / "mergekit-venv") / "mergekit-yaml").resolve()


def streammerge(recipe: Path, out: Path) -> dict[str, float]:
    """The command line, whole: start of Python, merge, fsync, rename."""
    ran = child.merge(recipe, out)
    return {"seconds": ran.elapsed_seconds, "cpu_seconds": ran.cpu_seconds, **_peaks(ran)}


def mergekit(command: Path, flags: tuple[str, ...], recipe: Path, out: Path) -> dict[str, float]:
    """mergekit-yaml, and the fsync that it leaves to the system."""
    began = time.perf_counter()
    ran = child.run([str(command), str(recipe), str(out), "--quiet", *flags])
    files.make_durable(files.weight_files([out]))
    return {"seconds": time.perf_counter() - began, "cpu_seconds": ran.cpu_seconds, **_peaks(ran)}


def dd(inputs: list[Path], sources: list[Path], out: Path) -> dict[str, float]:
    """Read every input, then write the output's size from warm files and fsync."""
    out.mkdir()
    began = time.perf_counter()
    for file in inputs:
        _dd(file, Path("/dev/null"))
    read = time.perf_counter() - began
    for file in sources:
        _dd(file, out / file.name, "conv=fsync")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "read_seconds": read, "write_seconds": seconds - read}


def _dd(source: Path, target: Path, *words: str) -> None:
    subprocess.run(["dd", f"if={source}", f"of={target}", "bs=8M", *words], check=True, stderr=subprocess.DEVNULL)


def _peaks(ran: child.Ran) -> dict[str, float]:
    return {"peak_anonymous_bytes": ran.peak_anonymous_bytes, "peak_resident_bytes": ran.peak_resident_bytes}


def compare(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of two bf16 models in units in the last place, and how many entries differ."""
    mine, theirs = files.tensor_places(one), files.tensor_places(other)
    if mine.keys() != theirs.keys():
        raise SystemExit(f"error: only one output has {sorted(mine.keys() ^ theirs.keys())}")
    largest = different = entries = 0
    for name, file in mine.items():
        with safe_open(file, "pt") as a, safe_open(theirs[name], "pt") as b:
            x, y = a.get_tensor(name), b.get_tensor(name)
        if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16 or x.shape != y.shape:
            raise SystemExit(f"error: `{name}` is {x.dtype} {list(x.shape)}, {y.dtype} {list(y.shape)}")
        steps = (_ordered(x) - _ordered(y)).abs()
        # where a sum nearly cancels, its fp32 rounding alone exceeds an ulp of what is left
        steps[(x.float() - y.float()).abs() <= 2**-23 * x.float().abs().max()] = 0
        largest, different = max(largest, int(steps.max())), different + int((steps > 0).sum())
        entries += x.numel()
    return {"largest_difference_ulp": largest, "differing_fraction": different / entries}


def _ordered(x: Tensor) -> Tensor:
    """bf16 as integers in the order of their values, neighbours one apart."""
    words = x.view(torch.int16).to(torch.int32)
    return torch.where(words < 0, -(words & 0x7FFF), words)


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    base, *experts = ensure(given.work / given.size, Settings(size=given.size), experts=3)[:4]
    inputs, sources = files.weight_files(experts), files.weight_files([base])
    command = mergekit_command(given.work)
    recipe = child.write_recipe(given.work / "linear.yaml", "linear", experts, parameters={"weight": 1.0})
    ways: dict[str, Callable[[Path], dict[str, float]]] = {
        "dd": partial(dd, inputs, sources),
        "streammerge": partial(streammerge, recipe),
        **{name: partial(mergekit, command, flags, recipe) for name, flags in MERGEKIT_WAYS.items()},
    }
    python = command.with_name("python")
    imports = {
        "streammerge": median(imports_only().elapsed_seconds for _ in range(3)),
        "mergekit": median(
            child.run([str(python), "-c", "import mergekit.scripts.run_yaml"]).elapsed_seconds for _ in range(3)
        ),
    }
    outs = {name: given.work / f"linear-{name.replace(' ', '-')}" for name in ways}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    difference: dict[str, float] = {}
    for repeat in range(given.repeats):
        order = [*list(ways)[repeat % len(ways) :], *list(ways)[: repeat % len(ways)]]
        for name in order:
            shutil.rmtree(outs[name], ignore_errors=True)
            left = files.make_cold(inputs)
            if left:
                raise SystemExit(f"error: {left} bytes of the inputs stayed in the page cache")
            files.make_warm(sources)
            found[name].append(ways[name](outs[name]))
            print(f"{repeat + 1}/{given.repeats} {name}: {found[name][-1]['seconds']:.1f} s", file=sys.stderr)
        if repeat == 0:
            difference = {
                name: compare(outs["streammerge"], outs[name])["largest_difference_ulp"] for name in MERGEKIT_WAYS
            }
            print(f"largest difference, ulp: {difference}", file=sys.stderr)
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
    files.make_cold([*inputs, *sources])
    report(given.results, given.size, found, difference, imports)


def report(
    results: Path,
    size: str,
    found: dict[str, list[dict[str, float]]],
    difference: dict[str, float],
    imports: dict[str, float],
) -> None:
    """Append a row a way and print the table; ratios only where the outputs agree."""
    seconds = {name: median(run["seconds"] for run in runs) for name, runs in found.items()}
    lines = []
    for name, runs in found.items():
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        facts: dict[str, object] = {"size": size, "way": name, "mergekit": MERGEKIT, **middle}
        tool = name.partition(" ")[0]
        if tool in imports:
            facts["imports_seconds"] = imports[tool]
        if name in difference:
            facts["largest_difference_ulp"] = difference[name]
        green = difference.get(name, 0) <= 1
        if green:
            facts["seconds_over_dd"] = seconds[name] / seconds["dd"]
            facts["seconds_over_streammerge"] = seconds[name] / seconds["streammerge"]
        rows.append(results, "linear_io", facts | {"all_seconds": [run["seconds"] for run in runs]})
        peak = rows.mib(middle["peak_anonymous_bytes"]) if "peak_anonymous_bytes" in middle else "-"
        ratios = [f"{facts[k]:.2f}" if green else "differs" for k in ("seconds_over_dd", "seconds_over_streammerge")]
        start = f"{imports[tool]:.2f}" if tool in imports else "-"
        lines.append((name, f"{seconds[name]:.2f}", start, *ratios, peak))
    columns = ("linear of 3", "seconds", "of them imports", "over dd", "over streammerge", "anonymous memory")
    print(rows.table(columns, lines))
    if max(difference.values()) > 1:
        raise SystemExit(f"error: outputs differ by more than 1 bf16 ulp: {difference}")


if __name__ == "__main__":
    main()
