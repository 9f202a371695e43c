"""The command line: text in, text and an exit code out."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

import streammerge
from streammerge.errors import StreamMergeError
from streammerge.merge_commands import merge, plan
from streammerge.method_commands import list_methods
from streammerge.model_commands import capture, extract, inspect, verify
from streammerge.night_commands import batch, evaluate
from streammerge.page_commands import diagnose, report

INTERRUPTED = 130


@click.group(
    commands=[merge, plan, inspect, verify, report, diagnose, capture, evaluate, batch, extract, list_methods],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(streammerge.__version__, package_name="streammerge")
@click.option("-v", "--verbose", count=True, help="Say more on stderr; -vv says all.")
def cli(verbose: int) -> None:
    """Merge language-model checkpoints that do not fit in memory."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    if not verbose:
        # what it says of retries would tear the progress line, and may hold signed addresses
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(level=level, stream=sys.stderr, format="%(name)s: %(message)s")


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
