"""The verbs that look: `report` on what merges did, `diagnose` on what one would meet."""

from __future__ import annotations

import os
import statistics
from typing import TYPE_CHECKING

import click

from streammerge import api
from streammerge.budget import format_bytes
from streammerge.errors import escaped
from streammerge.options import json_option, memory_option
from streammerge.progress import ProgressLine

if TYPE_CHECKING:
    from streammerge.diagnosis.result import Diagnosis

_PAGE = "report.html"


@click.command(
    epilog="""\b
Examples:
  streammerge report merged
  streammerge report merged-actmat merged-ties merged-linear -o comparison.html

The page opens without a network and holds no script. Files `results*.json` in a folder,
{"tasks": {name: {metric: number}}}, are shown beside what the merge says of itself."""
)
@click.argument("outs", nargs=-1, required=True, metavar="OUT…")
@click.option("-o", "--out", metavar="FILE", help="The page. Default: report.html in the first folder.")
def report(outs: tuple[str, ...], out: str | None) -> None:
    """Write a page about a merge, or compare several."""
    path = api.report(*outs, page=out or os.path.join(outs[0], _PAGE))
    click.echo(escaped(path))


@click.command(
    epilog="""\b
Examples:
  streammerge diagnose recipe.yaml
  streammerge diagnose recipe.yaml -o diagnosis --memory 4GiB
  streammerge diagnose recipe.yaml --merged merged-actmat --merged merged-ties

The recipe's method makes no difference. --merged also measures finished merges of the same models,
by any method, on one scale. One pass over the base and the experts; no model is written."""
)
@click.argument("recipe")
@click.option("-o", "--out", metavar="DIR", help="Write diagnosis.json and diagnosis.html there.")
@click.option("--merged", metavar="DIR", multiple=True, help="A finished merge to measure too, once for each.")
@memory_option
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def diagnose(
    recipe: str, out: str | None, merged: tuple[str, ...], memory: str | None, quiet: bool, as_json: bool
) -> None:
    """Say where experts will conflict, before merging."""
    with ProgressLine("looking", silent=quiet) as progress:
        found = api.diagnose(recipe, merged=merged, memory=memory, out=out, progress=progress.show)
    click.echo(found.to_json().rstrip() if as_json else _told(found))


def _told(found: Diagnosis) -> str:
    told = found.advice
    parts = [f"{key}: {value}" for key, value in {**told.parameters, **told.settings}.items()]
    lines = [
        f"{len(found.tensors)} tensors of {len(found.experts)} experts, {format_bytes(found.read_bytes)} "
        f"in {found.seconds:.1f} s",
        "",
        f"begin with {told.method}{', ' if parts else ''}{', '.join(parts)}",
        *(f"  because {reason}" for reason in told.reasons),
        *(f"  note: {note}" for note in told.notes),
    ]
    for place, name in enumerate(found.merged):
        values = [matrix.interference_merged[place] for _, matrix in found.matrices]
        middle = statistics.median(values) if values else 0.0
        lines.append(f"  {escaped(name)}: median interference {middle:.2f}, most {max(values, default=0.0):.2f}")
    return "\n".join(lines)
