"""The verbs of the night: `batch` runs many merges, `evaluate` has a harness look at one."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import click

from streammerge import api
from streammerge.budget import format_bytes
from streammerge.errors import StreamMergeError, escaped, quoted
from streammerge.options import device_memory_option, device_option, json_option, memory_option
from streammerge.progress import ProgressLine

if TYPE_CHECKING:
    from streammerge.batching import Group


@click.command(
    epilog="""\b
Examples:
  streammerge evaluate out --tasks arc_easy,hellaswag --limit 200
  streammerge evaluate out --tasks mine --include-path tasks --offline --python ~/harness/bin/python
  streammerge evaluate out --command "lighteval accelerate model_name={model} …"

The numbers go to OUT/results.json. A command ends with a line of JSON, such as {"accuracy": 0.5}, or
writes it to the file {results}."""
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

Jobs of the same models run side by side and read them once. Running the same command again goes on
where a batch ended, however it ended, and tries failed jobs again. Ctrl-C stops after the current
tensor. Exit code 1 where a job failed."""
)
@click.argument("night")
@click.option("--dry-run", is_flag=True, help="Show the jobs, their time and disk; merge nothing.")
@memory_option
@device_option
@device_memory_option
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@json_option
def batch(
    night: str, dry_run: bool, memory: str | None, device: str, device_memory: str | None, quiet: bool, as_json: bool
) -> None:
    """Run many merges in one process, overnight."""
    if dry_run:
        groups, failed = api.outline(night, memory=memory, device=device, device_memory=device_memory)
        click.echo(json.dumps(_outline_json(groups, failed)) if as_json else _outline_text(groups, failed))
        sys.exit(1 if failed else 0)

    def tell(name: str, text: str) -> None:
        if not as_json:
            click.echo(f"{escaped(name)}: {text}", err=True)

    with StopRequest() as stop, ProgressLine("merging", silent=quiet) as progress:
        outcome = api.batch(
            night,
            memory=memory,
            device=device,
            device_memory=device_memory,
            tell=tell,
            stopped=stop.asked,
            progress=progress.show,
        )
    if as_json:
        failures = {name: error.message for name, error in outcome.failed.items()}
        click.echo(json.dumps({"done": outcome.done, "failed": failures, "stopped": outcome.stopped}))
    else:
        click.echo(f"{len(outcome.done)} jobs done, {len(outcome.failed)} failed", err=True)
    if outcome.stopped:
        raise click.Abort(f"Run {quoted(shlex.join(['streammerge', 'batch', night]))} again to continue.")
    if outcome.failed:
        sys.exit(1)


class StopRequest:
    """While used as a context manager, the first SIGINT or SIGTERM only asks to stop; the next interrupts."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether a signal came."""
        return self._asked

    def __enter__(self) -> StopRequest:
        self._before = {each: signal.signal(each, self._ask) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        click.echo("stopping after the current tensor; again to stop at once", err=True)


def _outline_text(groups: Sequence[Group], failed: Mapping[str, StreamMergeError]) -> str:
    lines = []
    for group in groups:
        together = f"{len(group.jobs)} jobs side by side" if len(group.jobs) > 1 else "1 job"
        read, write = group.plans[0].read_bytes, sum(planned.layout.total_bytes for planned in group.plans)
        seconds = [planned.predicted_seconds for planned in group.plans]
        time = "" if None in seconds else f", at most {sum(each or 0.0 for each in seconds):.0f} s"
        lines.append(f"{together}: read {format_bytes(read)}, write {format_bytes(write)}{time}")
        lines += [f"  {job.name}: {job.recipe.method} of {len(job.recipe.experts)} models" for job in group.jobs]
    lines += [f"{escaped(name)} cannot run: {error.message}" for name, error in failed.items()]
    return "\n".join(lines)


def _outline_json(groups: Sequence[Group], failed: Mapping[str, StreamMergeError]) -> dict[str, Any]:
    return {
        "groups": [
            {
                "read_bytes": group.plans[0].read_bytes,
                "jobs": [
                    {
                        "name": job.name,
                        "method": job.recipe.method,
                        "write_bytes": planned.layout.total_bytes,
                        "predicted_seconds": planned.predicted_seconds,
                    }
                    for job, planned in zip(group.jobs, group.plans, strict=True)
                ],
            }
            for group in groups
        ],
        "failed": {name: error.message for name, error in failed.items()},
    }
