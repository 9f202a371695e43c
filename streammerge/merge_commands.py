"""The verbs of one merge: `merge` does it, `plan` says what it would take."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click

from streammerge import api
from streammerge.budget import format_bytes
from streammerge.errors import escaped
from streammerge.fetching import Fetches
from streammerge.interrupts import resumable
from streammerge.options import (
    consumed_option,
    device_memory_option,
    device_option,
    json_option,
    memory_option,
    shard_option,
)
from streammerge.plan import Plan, check_disk
from streammerge.progress import ProgressLine
from streammerge.recipe import Recipe
from streammerge.stacking import described
from streammerge.storage.places import Places
from streammerge.world import World


@click.command(
    epilog="""\b
Examples:
  streammerge merge recipe.yaml out
  streammerge merge recipe.yaml out --memory 4GiB --resume
  streammerge merge out/streammerge.json again
  streammerge merge adapters.yaml out --as-adapter --rank 16
  streammerge merge --base base --expert math --expert code --method actmat out"""
)
@click.argument("arguments", nargs=-1, metavar="[RECIPE] OUT")
@click.option("--base", metavar="MODEL", help="Base model, instead of a recipe.")
@click.option("--expert", "experts", metavar="MODEL", multiple=True, help="Expert, once for each.")
@click.option("--method", metavar="NAME", help="Merge method, instead of a recipe. Default: actmat.")
@memory_option
@shard_option
@device_option
@device_memory_option
@click.option("--as-adapter", is_flag=True, help="Write a LoRA adapter; all experts must be adapters of the base.")
@click.option(
    "--rank", type=click.IntRange(min=1), metavar="N", help="Cut that adapter's modules to N. Default: all of it."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted merge of the same inputs.")
@consumed_option
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def merge(
    arguments: tuple[str, ...],
    base: str | None,
    experts: tuple[str, ...],
    method: str | None,
    memory: str | None,
    max_shard_size: str | None,
    device: str,
    device_memory: str | None,
    as_adapter: bool,
    rank: int | None,
    resume: bool,
    delete_consumed: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge models into the new folder OUT."""
    if rank is not None and not as_adapter:
        raise click.UsageError("--rank is an adapter's: pass --as-adapter too")
    recipe, out = _recipe_and_out(arguments, base, experts, method)
    storage = Places()
    first = World.here().is_first
    planned = _planned(recipe, storage, memory, max_shard_size, device, device_memory)
    silent = quiet or not first
    with resumable(out), ProgressLine(f"merging {len(planned.steps)} tensors", silent=silent) as progress:
        if as_adapter:
            done = api.run_as_adapter(planned, out, storage, rank=rank, resume=resume, progress=progress.show)
        else:
            done = api.run(
                planned, out, storage, resume=resume, delete_consumed=delete_consumed, progress=progress.show
            )
    if not first:
        return
    if as_json:
        click.echo(json.dumps(done.totals()))
    else:
        click.echo(done.summary(), err=True)


@click.command()
@click.argument("recipe")
@click.argument("out", default=".")
@memory_option
@shard_option
@device_option
@device_memory_option
@json_option
def plan(
    recipe: str,
    out: str,
    memory: str | None,
    max_shard_size: str | None,
    device: str,
    device_memory: str | None,
    as_json: bool,
) -> None:
    """Show what a merge would do: bytes, memory, disk."""
    storage = Places()
    planned = _planned(recipe, storage, memory, max_shard_size, device, device_memory)
    needed, free = check_disk(planned, out)
    fetch = Fetches(planned, storage).nbytes
    figures = planned, needed, free, fetch
    click.echo(json.dumps(_plan_json(*figures)) if as_json else _plan_text(*figures))


def _recipe_and_out(
    arguments: tuple[str, ...], base: str | None, experts: tuple[str, ...], method: str | None
) -> tuple[Recipe, str]:
    without_recipe = bool(base or experts or method)
    if len(arguments) != (1 if without_recipe else 2):
        expected = "OUT alone beside --base, --expert and --method" if without_recipe else "RECIPE and OUT"
        raise click.UsageError(f"expected {expected}, found {len(arguments)} arguments")
    if not without_recipe:
        return Recipe.load(arguments[0]), arguments[1]
    if not experts:
        raise click.UsageError("--expert is missing: name each expert with its own --expert")
    recipe: dict[str, object] = {
        "merge_method": method or "actmat",
        "models": [{"model": expert} for expert in experts],
        **({"base_model": base} if base else {}),
    }
    return Recipe.from_dict(recipe), arguments[0]


def _planned(
    recipe: str | Recipe,
    storage: Places,
    memory: str | None,
    max_shard_size: str | None,
    device: str,
    device_memory: str | None,
) -> Plan:
    planned = api.plan(
        recipe,
        memory=memory,
        max_shard_size=max_shard_size,
        device=device,
        device_memory=device_memory,
        storage=storage,
    )
    # the processes that merge together all find the same
    for warning in planned.warnings if World.here().is_first else ():
        click.echo(f"warning: {warning}", err=True)
    return planned


def _plan_text(planned: Plan, needed: int, free: int, fetch: int) -> str:
    recipe, memory = planned.recipe, planned.memory
    onto = f" onto {escaped(planned.names[0])}" if recipe.base else ""
    dtypes = Counter(step.outputs[0][1] for step in planned.steps)
    by_method = Counter((step.method + " of factors" * step.thin, step.role.kind.value) for step in planned.steps)
    files = sum(len(model.header_sha256) for model in planned.models)
    seconds = planned.predicted_seconds
    lines = [
        f"{recipe.method} of {len(recipe.experts)} models{onto}, {', '.join(d for d, _ in dtypes.most_common())}",
        "",
        *(f"  layers    {escaped(line)}" for line in described(recipe, planned.names)),
        f"  tensors   {len(planned.steps)}",
        *(f"            {count} {kind} by {method}" for (method, kind), count in by_method.most_common()),
        *_vocabulary_lines(planned),
        f"  read      {format_bytes(planned.read_bytes)} from {files} files",
        *([f"  fetch     {format_bytes(fetch)} of them first"] if fetch else []),
        f"  write     {format_bytes(needed)} to {len(planned.layout.shards)} shards; {format_bytes(free)} free",
        f"  memory    {format_bytes(memory.peak_bytes)} of {format_bytes(memory.budget_bytes)}, in each process",
        *_device_lines(planned),
        f"  compute   {planned.flops / 1e12:.2f} TFLOP",
        f"  time      {'unknown before the first merge here' if seconds is None else f'about {seconds:.0f} s'}",
    ]
    return "\n".join(lines)


def _vocabulary_lines(planned: Plan) -> list[str]:
    made = planned.vocabulary
    return [f"  tokens    {made.rows} rows; {len(made.added)} tokens added"] if made else []


def _device_lines(planned: Plan) -> list[str]:
    device = planned.device_memory
    if device is None:
        return []
    at_most = f"at most {format_bytes(device.largest_step_bytes)} a step of {format_bytes(device.budget_bytes)}"
    return [f"  device    {at_most} on {planned.device}"]


def _plan_json(planned: Plan, needed: int, free: int, fetch: int) -> dict[str, Any]:
    return {
        "method": planned.recipe.method,
        "models": list(planned.names),
        "layers": described(planned.recipe, planned.names),
        "read_bytes": planned.read_bytes,
        "fetch_bytes": fetch,
        "disk_needed_bytes": needed,
        "disk_free_bytes": free,
        "memory_bytes": planned.memory.peak_bytes,
        "expected_memory_bytes": planned.memory.expected_bytes,
        "budget_bytes": planned.memory.budget_bytes,
        "device": planned.device,
        "device_budget_bytes": planned.device_memory.budget_bytes if planned.device_memory else None,
        "flops": planned.flops,
        "predicted_seconds": planned.predicted_seconds,
        "shards": [shard.file for shard in planned.layout.shards],
        "warnings": list(planned.warnings),
        "steps": [
            {
                "name": step.name,
                "class": step.role.kind.value,
                "method": step.method,
                "shape": list(step.shape),
                "dtype": step.outputs[0][1],
                "read_bytes": step.read_bytes,
                "write_bytes": step.write_bytes,
                "flops": step.flops,
                "workspace_bytes": planned.workspace_bytes(step),
                "thin": step.thin,
            }
            for step in planned.steps
        ],
    }
