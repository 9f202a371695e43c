"""GPU check: a whole 7B-shaped model and three experts merged, from files in memory to the disk."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import child
import files
import torch
import truth
from generate import Folder
from gpu_run import Run
from llama import SIZES, Shape
from torch import Tensor

import streammerge
from streammerge import api
from streammerge.budget import available_memory_bytes, parse_bytes
from streammerge.plan import make_plan
from streammerge.recipe import Recipe
from streammerge.report import Report
from streammerge.storage.local import LocalStorage

EXPERTS = 3
# OLMo-3-7B's matrices; what it has beyond a Llama's are vectors
OLMO_7B = Shape(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=100278,
)
MEMORY, SMALL_MEMORY = "8GiB", "128MiB"
# an 8 GB card, by the share that a merge takes of what is free
SMALL_CARD = "6.4GiB"
# layers that differ; deeper ones repeat them
DISTINCT = 2
DISK_LAYERS, CARD_LAYERS = 8, 4
BLOCK_ELEMENTS = 1 << 25
WRITERS = 16
# of memory and disk, for what else is there
SPARE_BYTES = 6 << 30
# bf16 outputs that may differ from float64's result rounded: the solver's error moves those near a tie
MOST_DIFFERING = 0.02
SPOTS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.{last}.mlp.down_proj.weight", "lm_head.weight")


def merge(run: Run) -> None:
    """The set is made, merged with all of the device's memory, and again with an 8 GB card's."""
    shape = SIZES["tiny"] if run.small else OLMO_7B
    place, layers = (run.shared, shape.num_hidden_layers) if run.small else _room(run, shape)
    shape = replace(shape, num_hidden_layers=layers)
    models = _made(run, place / "whole", shape)
    wall = _merged(run, "whole", models, shape, None)
    if run.left_seconds < 1.5 * wall + 15:
        shutil.rmtree(place / "whole")
        wall *= min(CARD_LAYERS, layers) / layers
        shape = replace(shape, num_hidden_layers=min(CARD_LAYERS, layers))
        models = _made(run, place / "few", shape)
    for case, device_memory, method in (
        ("8 GB card", SMALL_CARD, "actmat"),
        ("element by element", None, "task_arithmetic"),
    ):
        run.part(case, _merged, case, models, shape, device_memory, method, needs=1.2 * wall + run.pick(10.0, 0.0))


def _room(run: Run, shape: Shape) -> tuple[Path, int]:
    """Where the set goes and how many layers fit, with the output on the disk."""
    one, two = (_nbytes(replace(shape, num_hidden_layers=layers)) for layers in (1, 2))
    models = EXPERTS + 1
    disk = shutil.disk_usage(run.work).free - SPARE_BYTES
    in_memory = min(shutil.disk_usage(run.shared).free, available_memory_bytes() - parse_bytes(MEMORY) - SPARE_BYTES)
    found = {
        run.shared: min(_layers(in_memory / models, one, two - one), _layers(disk, one, two - one)),
        run.work: min(_layers(disk / (models + 1), one, two - one), DISK_LAYERS),
    }
    place = max(found, key=lambda folder: (found[folder], folder == run.shared))
    layers = min(found[place], shape.num_hidden_layers)
    run.row(
        "room", "green", layers=layers, of=shape.num_hidden_layers,
        place="memory" if place == run.shared else "disk", memory_bytes=in_memory, disk_bytes=disk,
    )  # fmt: skip
    if layers < 1:
        raise RuntimeError(f"no room for a layer: {in_memory} bytes in memory, {disk} on the disk")
    return place, layers


def _layers(nbytes: float, first: int, each: int) -> int:
    return int((nbytes - first) // each) + 1


def _nbytes(shape: Shape) -> int:
    return sum(2 * torch.Size(dims).numel() for dims in shape.tensors().values())


def _made(run: Run, folder: Path, shape: Shape) -> list[Path]:
    """Write a base and its experts, drawn on the device."""
    began = time.perf_counter()
    paths = [folder / name for name in ("base", *(f"expert-{number}" for number in range(1, EXPERTS + 1)))]
    shards = 2 if shape.num_hidden_layers < 8 else 4
    layers = shape.num_hidden_layers
    with ThreadPoolExecutor(WRITERS) as threads:
        models = list(threads.map(lambda path: Folder(path, shape, shards), paths))
        pending: list[Future[None]] = []
        for names, dims in _alike(shape):
            for first, stack in _drawn(run, dims):
                words = stack.view(torch.int16).cpu().view(torch.uint16).numpy()
                for name in names:
                    for model, run_of_words in zip(models, words, strict=True):
                        pending.append(threads.submit(model.write, name, first, run_of_words))
            for future in pending:
                future.result()
            pending.clear()
        list(threads.map(Folder.close, models))
    nbytes = len(models) * _nbytes(shape)
    run.row("made", "green", seconds=time.perf_counter() - began, bytes=nbytes, layers=layers,
            distinct_layers=min(DISTINCT, layers), models=len(models))  # fmt: skip
    return paths


def _alike(shape: Shape) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Names of the tensors that get the same numbers, with their shape."""
    groups: dict[str, list[str]] = {}
    tensors = shape.tensors()
    for name in tensors:
        words = name.split(".")
        if words[1] == "layers":
            words[2] = str(int(words[2]) % DISTINCT)
        groups.setdefault(".".join(words), []).append(name)
    for names in groups.values():
        yield names, tensors[names[0]]


def _drawn(run: Run, dims: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """First element and [1 + EXPERTS, elements] bf16 of each run of rows: the base, then the experts."""
    columns = dims[1] if len(dims) == 2 else 1
    step = max(1, BLOCK_ELEMENTS // columns)
    for row in range(0, dims[0], step):
        rows = min(step, dims[0] - row)
        base, experts = run.experts("sft", rows, columns, EXPERTS)
        stack = torch.cat((base[None], experts))
        # a norm's weights are near one
        yield row * columns, (stack if len(dims) == 2 else stack + 1).view(1 + EXPERTS, -1)


def _merged(
    run: Run, case: str, models: list[Path], shape: Shape, device_memory: str | None, method: str = "actmat"
) -> float:
    """Merge, compare a few tensors with float64, write the row and delete the output; returns the seconds."""
    base, *experts = models
    recipe = child.write_recipe(run.work / "gpu.yaml", method, experts, base)
    out = run.work / "merged"
    try:
        with _utilisation(run) as busy:
            report = _reported(run, recipe, out, device_memory)
        spots = {name: _spot(run, name, models, out, method) for name in _spots(shape)}
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    totals, seconds = report.totals(), report.seconds
    within = report.memory["device_used"] <= report.memory["device_budget"]
    right = all(spot["differing"] <= MOST_DIFFERING and spot["error"] <= 1.1 * spot["floor"] for spot in spots.values())
    figures: dict[str, object] = {}
    if right:
        moved = (totals["read_bytes"] + totals["written_bytes"]) / 1e9
        figures = {"seconds": seconds.wall, "gb_per_s": moved / seconds.wall, "where": asdict(seconds)}
    worst = report.worst_certificate
    run.row(
        case, "green" if right and within else "red", way=method, layers=shape.num_hidden_layers, memory=report.memory,
        read_bytes=totals["read_bytes"], written_bytes=totals["written_bytes"], tensors=totals["tensors"],
        worst_certificate=worst[1] if worst else None, spots=spots, busy=busy, **figures,
        escalated=sum(outcome.facts.get("escalation", "none") != "none" for outcome in report.tensors),
    )  # fmt: skip
    return seconds.wall


def _reported(run: Run, recipe: Path, out: Path, device_memory: str | None) -> Report:
    memory = run.pick(MEMORY, SMALL_MEMORY)
    if run.on_gpu:
        device = "cuda" if device_memory is None else str(run.device)
        return streammerge.merge(recipe, out, memory=memory, device=device, device_memory=device_memory)
    # the same engine, whose device is the CPU
    storage = LocalStorage()
    plan = make_plan(
        Recipe.load(recipe),
        storage,
        memory_bytes=parse_bytes(memory),
        device_memory_bytes=parse_bytes(device_memory or SMALL_CARD),
    )
    return api.run(plan, str(out), storage)


def _spots(shape: Shape) -> list[str]:
    return [name.format(last=shape.num_hidden_layers - 1) for name in SPOTS]


def _spot(run: Run, name: str, models: list[Path], out: Path, method: str) -> dict[str, float]:
    """How far a merged tensor is from float64: shares of the change, and of outputs that differ once rounded.

    floor is the error of float64's own result rounded to bf16.
    """
    base, *experts = (files.read_tensor(model, name) for model in models)
    found = files.read_tensor(out, name)
    # the larger ones would take the host minutes
    device = run.device if max(base.shape) > 2 * min(base.shape) else torch.device("cpu")
    base, found, experts = base.to(device), found.to(device), [expert.to(device) for expert in experts]
    deltas = truth.deltas64(base, experts)
    with device:
        if method != "actmat":
            change = sum(deltas[1:], deltas[0])
        elif name.startswith("lm_head"):
            change = sum(deltas[1:], deltas[0]) / len(deltas)
        else:
            change = truth.formula64("ridge", deltas)
    exact = base.double() + change
    rounded = exact.bfloat16()
    size = float(change.norm())
    return {
        "error": float((found.double() - exact).norm()) / size,
        "floor": float((rounded.double() - exact).norm()) / size,
        "differing": float((rounded != found).double().mean()),
    }


@contextmanager
def _utilisation(run: Run) -> Iterator[dict[str, float]]:
    """What nvidia-smi says of the device meanwhile: the share of time in which a kernel ran, and memory in use."""
    found: dict[str, float] = {}
    if not run.on_gpu or not shutil.which("nvidia-smi"):
        yield found
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
    sampler = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(sampler.stdout or ()))
    reader.start()
    try:
        yield found
    finally:
        sampler.terminate()
        sampler.wait()
        reader.join()
        pairs = [line.split(",") for line in lines if line.count(",") == 1]
        samples = [(float(share), float(used)) for share, used in pairs if share.strip().isdigit()]
        if samples:
            found["gpu_busy_share"] = sum(share for share, _ in samples) / len(samples) / 100
            found["most_device_mib"] = max(used for _, used in samples)
            found["samples"] = len(samples)
