"""The command line: text in, text and an exit code out."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from collections import Counter
from dataclasses import asdict
from types import FrameType
from typing import Any, NoReturn

import click

import streammerge
from streammerge import api, methods
from streammerge.budget import format_bytes
from streammerge.errors import StreamMergeError, escaped, quoted
from streammerge.fetching import Fetches
from streammerge.night_commands import batch, evaluate
from streammerge.options import device_memory_option, device_option, json_option, memory_option, shard_option
from streammerge.page_commands import diagnose, report
from streammerge.plan import Plan, check_disk
from streammerge.progress import ProgressLine
from streammerge.recipe import Recipe
from streammerge.solve.cost import Cost
from streammerge.stacking import described
from streammerge.storage.places import Places
from streammerge.world import World

DIFFERENT = 3
INTERRUPTED = 130
_WIDEST_NAME = 100


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(streammerge.__version__, package_name="streammerge")
@click.option("-v", "--verbose", count=True, help="Say more on stderr; -vv says all.")
def cli(verbose: int) -> None:
    """Merge language-model checkpoints that do not fit in memory."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    if not verbose:
        # what it says of retries would tear the progress line, and may hold signed addresses
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(level=level, stream=sys.stderr, format="%(name)s: %(message)s")


@cli.command(
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
@click.option(
    "--delete-consumed",
    is_flag=True,
    help="Delete each file that this merge fetched when all of it is merged; never one that was there before.",
)
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
    planned = api.plan(
        recipe,
        memory=memory,
        max_shard_size=max_shard_size,
        device=device,
        device_memory=device_memory,
        storage=storage,
    )
    first = World.here().is_first
    if first:
        _warn(planned)
    try:
        with ProgressLine(f"merging {len(planned.steps)} tensors", silent=quiet or not first) as progress:
            if as_adapter:
                done = api.run_as_adapter(planned, out, storage, rank=rank, resume=resume, progress=progress.show)
            else:
                done = api.run(
                    planned, out, storage, resume=resume, delete_consumed=delete_consumed, progress=progress.show
                )
    except KeyboardInterrupt as interrupt:
        partial = f"{os.path.abspath(out)}.partial"
        hint = f"Pass `--resume` to continue: {quoted(partial)} holds what is done."
        raise click.Abort(*([hint] if os.path.isdir(partial) else [])) from interrupt
    if not first:
        return
    if as_json:
        click.echo(json.dumps(done.totals()))
    else:
        click.echo(done.summary(), err=True)


@cli.command()
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
    planned = api.plan(
        recipe,
        memory=memory,
        max_shard_size=max_shard_size,
        device=device,
        device_memory=device_memory,
        storage=storage,
    )
    _warn(planned)
    needed, free = check_disk(planned, out)
    fetch = Fetches(planned, storage).nbytes
    figures = planned, needed, free, fetch
    click.echo(json.dumps(_plan_json(*figures)) if as_json else _plan_text(*figures))


@cli.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL…")
@json_option
def inspect(models: tuple[str, ...], as_json: bool) -> None:
    """List tensors, their classes and differences."""
    found = api.inspect(*models)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    for model, roles in zip(found.models, found.roles, strict=True):
        dtypes = Counter(entry.dtype for entry in model.tensors.values())
        count = ", ".join(f"{number} {dtype}" for dtype, number in dtypes.most_common())
        size = format_bytes(model.tensor_bytes)
        click.echo(f"{escaped(model.location)}: {len(model.tensors)} tensors ({count}), {size}")
        if len(found.models) == 1:
            # names come from outside: escaped, cut, and the column no wider than a screen
            shown = {name: quoted(name)[1:-1] for name in model.tensors}
            width = min(max(map(len, shown.values()), default=0), _WIDEST_NAME)
            for name, entry in model.tensors.items():
                kind = roles[name].kind.value
                click.echo(f"  {shown[name]:{width}}  {entry.dtype:4}  {kind:11}  {list(entry.shape)}")
    for line in (*found.notes, *found.differences):
        click.echo(line)
    if len(found.models) > 1 and not found.differences:
        click.echo("same names and shapes in all" if not found.notes else "so the same names and shapes in all")


@cli.command(
    epilog="""\b
Examples:
  streammerge verify out
  streammerge verify out --recompute 20 --memory 4GiB
  streammerge verify model-of-another-tool --base base

Exit code 3 where anything differs. What --recompute merges again may differ by the rounding of the
output's dtype, by 1e-4 of the change and by three times a solver's certificate. A folder without
streammerge.json is checked as far as it goes, and the answer says how far."""
)
@click.argument("out")
@click.option("--base", metavar="DIR", help="Also compare names and shapes with this model's.")
@click.option("--inputs", is_flag=True, help="Also check that the inputs are still the same, by size and header.")
@click.option(
    "--recompute",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also merge N tensors again in float64, of each method and class one first. Implies --inputs.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Which N are drawn. Default: 0.")
@memory_option
@json_option
def verify(
    out: str, base: str | None, inputs: bool, recompute: int | None, seed: int, memory: str | None, as_json: bool
) -> None:
    """Check a merged folder against its report."""
    found = api.verify(out, base=base, inputs=inputs, recompute=recompute or 0, seed=seed, memory=memory)
    if as_json:
        told = asdict(found)
        del told["read_bytes"]
        # JSON has no word for infinity
        for each in told["recomputed"]:
            each["difference"] = each["difference"] if math.isfinite(each["difference"]) else None
        click.echo(json.dumps(told))
    else:
        for each in found.recomputed:
            size = f"{each.difference:.1e} of its change beyond rounding, {each.allowed:.1e} allowed"
            click.echo(f"{quoted(each.name)} ({each.method}, {each.kind}): {size}")
        for line in found.notes:
            click.echo(f"note: {line}")
        for line in found.unchecked:
            click.echo(f"not checked: {line}")
        for problem in found.problems:
            click.echo(problem)
        click.echo(f"{escaped(out)}: {found.tensors} tensors, {len(found.problems)} problems")
    if found.problems:
        sys.exit(DIFFERENT)


@cli.command(
    epilog="""\b
Examples:
  streammerge capture math --data math.jsonl -o math-covariance
  streammerge capture math --data math.jsonl -o math-data --fisher --samples 256 --memory 8GiB

A line of FILE is {"text": …}, {"prompt": …, "completion": …} or {"messages": […]}, which goes
through the tokenizer's chat template."""
)
@click.argument("model")
@click.option("--data", metavar="FILE", required=True, help="JSON Lines file of samples.")
@click.option("-o", "--out", metavar="DIR", required=True, help="The new folder; the Fisher goes to DIR/fisher.")
@click.option("--fisher", is_flag=True, help="Also store the diagonal Fisher, with the data's own labels.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use the first N samples. Default: all.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), metavar="N", default=512, help="Tokens of a sample. Default: 512."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    default=8,
    help="Samples of one length to run together. Default: 8.",
)
@memory_option
@click.option("--resume", is_flag=True, help="Continue an interrupted capture of the same inputs.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def capture(
    model: str,
    data: str,
    out: str,
    fisher: bool,
    samples: int | None,
    max_tokens: int,
    batch_size: int,
    memory: str | None,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a model over text for regmean and fisher."""
    try:
        with ProgressLine("capturing", silent=quiet) as progress:
            captured = api.capture(
                model,
                data,
                out,
                memory=memory,
                max_tokens=max_tokens,
                samples=samples,
                batch_size=batch_size,
                fisher=fisher,
                resume=resume,
                progress=progress.show,
            )
    except KeyboardInterrupt as interrupt:
        partial = f"{os.path.abspath(out)}.partial"
        hint = f"Pass `--resume` to continue: {quoted(partial)} holds what is done."
        raise click.Abort(*([hint] if os.path.isdir(partial) else [])) from interrupt
    for warning in captured.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(captured.totals()))
    else:
        click.echo(captured.summary(), err=True)


@cli.command(
    epilog="""\b
Examples:
  streammerge extract math --base base --rank 32 -o math-adapter

Embeddings, norms and biases that changed are kept whole. The error of each matrix is printed with
--json and kept in extraction.json."""
)
@click.argument("expert")
@click.option("--base", metavar="DIR", required=True, help="The model that EXPERT was trained from.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", required=True, help="Rank of each change.")
@click.option("-o", "--out", metavar="DIR", required=True, help="The new folder.")
@memory_option
@click.option("--resume", is_flag=True, help="Continue an interrupted extraction of the same inputs.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def extract(
    expert: str, base: str, rank: int, out: str, memory: str | None, resume: bool, quiet: bool, as_json: bool
) -> None:
    """Make a LoRA adapter of a full model."""
    with ProgressLine("extracting", silent=quiet) as progress:
        found = api.extract(expert, base, out, rank=rank, memory=memory, resume=resume, progress=progress.show)
    if as_json:
        click.echo(json.dumps(found.totals()))
    else:
        click.echo(found.summary(), err=True)


cli.add_command(evaluate)
cli.add_command(batch)
cli.add_command(report)
cli.add_command(diagnose)


@cli.command("methods")
@click.argument("name", required=False)
@json_option
def list_methods(name: str | None, as_json: bool) -> None:
    """List merge methods, or explain one."""
    if name is None:
        described = [methods.describe(each) for each in methods.names()]
        if as_json:
            click.echo(json.dumps({m.name: m.summary for m in described}))
            return
        width = max(len(m.name) for m in described)
        for method in described:
            click.echo(f"{method.name:{width}}  {method.summary}")
        return
    if name not in methods.names():
        raise StreamMergeError(f"unknown method {quoted(name)}", hint="`streammerge methods` lists them.")
    method = methods.describe(name)
    click.echo(json.dumps(_method_json(method)) if as_json else _method_text(method))


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 done, 1 an error to act on, 2 wrong usage, 3 verify found a
    difference, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = cli.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt) as stop:
        _tell("interrupted", stop.args[0] if stop.args else None)
        sys.exit(INTERRUPTED)
    except StreamMergeError as error:
        _tell(f"error: {error.message}", error.hint)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _tell(message: str, hint: str | None) -> None:
    click.echo(message, err=True)
    if hint:
        click.echo(f"\nhint: {hint}", err=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # a scheduler's stop ends as cleanly as Ctrl-C: what is done becomes durable, files are closed
    raise KeyboardInterrupt


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


def _warn(planned: Plan) -> None:
    for warning in planned.warnings:
        click.echo(f"warning: {warning}", err=True)


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


def _method_text(method: methods.Method) -> str:
    lines = [f"{method.name}   {method.summary}", ""]
    width = max((len(name) for name in method.parameters), default=0)
    for parameter in method.parameters.values():
        scope = ", per model" if parameter.per_expert else ""
        choices = f" ({' | '.join(parameter.choices)})" if parameter.choices else ""
        interval = f"; {parameter.interval}" if parameter.interval else ""
        about = f"{parameter.summary}{choices}{interval}; default {parameter.default}{scope}"
        lines.append(f"  {parameter.name:{width}}  {about}")
    if method.notes:
        lines += ["", *(f"  {line}".rstrip() for line in method.notes.splitlines())]
    base = "needs a base" if method.needs_base else "needs no base"
    data = f" · needs a {method.beside} of each expert" if method.beside else ""
    paper = f" · https://arxiv.org/abs/{method.paper.removeprefix('arXiv:')}" if method.paper else ""
    cost = _example_cost(method)
    readings = cost.looks + cost.passes
    passes = "once" if readings == 1 else f"{readings} times"
    beside = f", {format_bytes(cost.workspace_bytes)} beside them" if method.streams_by == "matrix" else ""
    return "\n".join(
        [
            *lines,
            "",
            f"  {_EXAMPLE}: {cost.flops / 1e12:.3g} TFLOP, inputs read {passes}{beside}",
            f"  streams by {method.streams_by} · {base}{data}{paper}",
        ]
    )


_EXAMPLE, _EXAMPLE_SHAPE, _EXAMPLE_EXPERTS = "a 4096 x 4096 matrix of 3 experts", (4096, 4096), 3


def _example_cost(method: methods.Method) -> Cost:
    """What the method takes by its defaults for one matrix of float32 arithmetic."""
    defaults = {parameter.keyword: parameter.default for parameter in method.parameters.values()}
    return method.cost(_EXAMPLE_SHAPE, _EXAMPLE_EXPERTS, defaults, 4)


def _method_json(method: methods.Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "needs_base": method.needs_base,
        "streams_by": method.streams_by,
        "beside": method.beside,
        "notes": method.notes,
        "cost": {"of": _EXAMPLE, **asdict(_example_cost(method))},
        "parameters": {
            p.name: {
                "type": p.type,
                "choices": list(p.choices),
                "range": str(p.interval) if p.interval else None,
                "default": p.default,
                "per_model": p.per_expert,
                "summary": p.summary,
            }
            for p in method.parameters.values()
        },
    }
