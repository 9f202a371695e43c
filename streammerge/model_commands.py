"""The verbs of one model: `inspect` and `verify` look at it, `capture` and `extract` take something from it."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import asdict

import click

from streammerge import api
from streammerge.budget import format_bytes
from streammerge.errors import escaped, quoted
from streammerge.interrupts import resumable
from streammerge.options import json_option, memory_option
from streammerge.progress import ProgressLine

DIFFERENT = 3
_WIDEST_NAME = 100


@click.command()
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


@click.command(
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


@click.command(
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
    with resumable(out), ProgressLine("capturing", silent=quiet) as progress:
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
    for warning in captured.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(captured.totals()))
    else:
        click.echo(captured.summary(), err=True)


@click.command(
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
    with resumable(out), ProgressLine("extracting", silent=quiet) as progress:
        found = api.extract(expert, base, out, rank=rank, memory=memory, resume=resume, progress=progress.show)
    if as_json:
        click.echo(json.dumps(found.totals()))
    else:
        click.echo(found.summary(), err=True)
