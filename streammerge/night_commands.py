"""The verbs of the night: `batch` runs many merges, `evaluate` has a harness look at one."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from streammerge import api
from streammerge.budget import format_bytes
from streammerge.errors import escaped, quoted
from streammerge.interrupts import StopRequest
from streammerge.options import consumed_option, device_memory_option, device_option, json_option, memory_option
from streammerge.progress import ProgressLine

if TYPE_CHECKING:
    from streammerge.batching import Outline


@click.command(
    epilog="""\b
Examples:
  streammerge evaluate out --tasks arc_easy,hellaswag --limit 200
  streammerge evaluate out --tasks mine --include-path tasks --offline --python ~/harness/bin/python
  streammerge evaluate out --command "lighteval accelerate model_name={model} …"

The numbers go to OUT/results.json and into a table of OUT/README.md. A command ends with a line of
JSON, such as {"accuracy": 0.5}, or writes it to the file {results}."""
)
@click.argument("out")
@click.option("--tasks", metavar="NAMES", help="Tasks of the lm-evaluation-harness, with commas between them.")
@click.option("--include-path", metavar="DIR", help="Folder of task files.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use N samples of each task. Default: all.")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples in the prompt. Default: a task's."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", default=8, help="Samples to run together. Default: 8."
)
@click.option("--dtype", metavar="NAME", default="auto", help="Such as float32. Default: auto, the model's.")
@click.option("--chat-template", is_flag=True, help="Put prompts into the model's chat template.")
@click.option("--offline", is_flag=True, help="Fetch nothing.")
@click.option("--python", metavar="FILE", help="Interpreter that has lm-eval. Default: this one.")
@click.option("--command", metavar="TEXT", help="Another harness, with {model} where the folder goes.")
@click.option("--timeout", type=click.FloatRange(min=0.0), metavar="SECONDS", help="Give up after so long.")
@device_option
@json_option
def evaluate(
    out: str,
    tasks: str | None,
    include_path: str | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    dtype: str,
    chat_template: bool,
    offline: bool,
    python: str | None,
    command: str | None,
    timeout: float | None,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate a merged folder with a harness."""
    if (tasks is None) == (command is None):
        raise click.UsageError("expected either --tasks or --command")
    asked: dict[str, object] = {"command": command}
    if tasks is not None:
        asked = {
            "tasks": [task.strip() for task in tasks.split(",") if task.strip()],
            "include_path": include_path,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": device,
            "apply_chat_template": chat_template,
            "offline": offline,
            "python": python,
        }
    results = api.evaluate(out, {**asked, "timeout_seconds": timeout})
    if as_json:
        click.echo(json.dumps(results))
        return
    for task, metrics in results.items():
        for metric, value in metrics.items():
            click.echo(f"{escaped(task)}  {escaped(metric)}  {value:.6g}")


@click.command(
    epilog="""\b
Examples:
  streammerge batch night.yaml --dry-run
  streammerge batch night.yaml --memory 8GiB

\b
night.yaml:
  out: tonight
  jobs:
    - recipe: recipe.yaml
    - recipe: {merge_method: actmat, base_model: base, models: [{model: math}, {model: code}]}
      grid: {parameters.ridge: [0.01, 0.1, 1.0], merge_method: [actmat, wudi]}
  evaluate: {command: "python score.py {model}"}
  keep: {best: 2, by: command.accuracy}

Jobs of the same models run side by side and read them once. report.html in the batch's folder shows
at any time what became of each. Running the same command again goes on where a batch ended, however it
ended, and tries failed jobs again. Ctrl-C stops after the current tensor. Exit code 1 where a job failed."""
)
@click.argument("night")
@click.option("--dry-run", is_flag=True, help="Show the jobs that are left, their time and disk; merge nothing.")
@memory_option
@device_option
@device_memory_option
@consumed_option
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def batch(
    night: str,
    dry_run: bool,
    memory: str | None,
    device: str,
    device_memory: str | None,
    delete_consumed: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run many merges in one process, overnight."""
    if dry_run:
        found = api.outline(night, memory=memory, device=device, device_memory=device_memory)
        click.echo(json.dumps(_outline_json(found)) if as_json else _outline_text(found))
        sys.exit(1 if found.failed else 0)

    def tell(name: str, text: str) -> None:
        if not as_json:
            click.echo(f"{escaped(name)}: {text}", err=True)

    with StopRequest() as stop, ProgressLine("merging", silent=quiet) as progress:
        outcome = api.batch(
            night,
            memory=memory,
            device=device,
            device_memory=device_memory,
            delete_consumed=delete_consumed,
            tell=tell,
            stopped=stop.asked,
            progress=progress.show,
        )
    if as_json:
        failures = {name: error.message for name, error in outcome.failed.items()}
        click.echo(json.dumps({"done": outcome.done, "failed": failures, "stopped": outcome.stopped}))
    else:
        click.echo(f"{len(outcome.done)} jobs done, {len(outcome.failed)} failed: {escaped(outcome.page)}", err=True)
    if outcome.stopped:
        raise click.Abort(f"Run {quoted(shlex.join(['streammerge', 'batch', night]))} again to continue.")
    if outcome.failed:
        sys.exit(1)


def _outline_text(found: Outline) -> str:
    lines = []
    for each in found.groups:
        jobs = each.group.jobs
        together = f"{len(jobs)} jobs side by side" if len(jobs) > 1 else "1 job"
        lines.append(f"{together}: {_costs(each.read_bytes, each.fetch_bytes, each.write_bytes, each.seconds)}")
        lines += [f"  {job.name}: {job.recipe.method} of {len(job.recipe.experts)} models" for job in jobs]
    lines += [f"{escaped(name)} is done" for name in found.done]
    lines += [f"{escaped(name)} cannot run: {error.message}" for name, error in found.failed.items()]
    if found.groups:
        written = sum(each.write_bytes for each in found.groups)
        alone = f", {format_bytes(found.alone_bytes)} one by one" if found.alone_bytes > found.read_bytes else ""
        lines += [
            "",
            f"in all {_costs(found.read_bytes, found.fetch_bytes, written, found.seconds, alone)}",
            f"disk {format_bytes(found.most_bytes)} at most at a time; {format_bytes(found.free_bytes)} free",
        ]
    return "\n".join(lines)


def _costs(read: int, fetch: int, write: int, seconds: float | None, alone: str = "") -> str:
    first = f", fetch {format_bytes(fetch)}" if fetch else ""
    time = "time unknown before merges of these kinds here" if seconds is None else f"about {seconds:.0f} s"
    return f"read {format_bytes(read)}{alone}{first}, write {format_bytes(write)}, {time}"


def _outline_json(found: Outline) -> dict[str, Any]:
    return {
        "groups": [
            {
                "read_bytes": each.read_bytes,
                "fetch_bytes": each.fetch_bytes,
                "write_bytes": each.write_bytes,
                "predicted_seconds": each.seconds,
                "jobs": [
                    {
                        "name": job.name,
                        "method": job.recipe.method,
                        "write_bytes": planned.layout.total_bytes,
                        "predicted_seconds": planned.predicted_seconds,
                    }
                    for job, planned in zip(each.group.jobs, each.group.plans, strict=True)
                ],
            }
            for each in found.groups
        ],
        "read_bytes": found.read_bytes,
        "read_bytes_one_by_one": found.alone_bytes,
        "fetch_bytes": found.fetch_bytes,
        "predicted_seconds": found.seconds,
        "disk_needed_bytes": found.most_bytes,
        "disk_free_bytes": found.free_bytes,
        "done": list(found.done),
        "failed": {name: error.message for name, error in found.failed.items()},
    }
