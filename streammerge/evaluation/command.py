"""Any harness, by its command line."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.checkpoint import parse_json
from streammerge.errors import CheckpointError, EvaluationError, escaped, quoted
from streammerge.located_yaml import Located

LARGEST_RESULTS_BYTES = 10_000_000
_SHOWN_CHARACTERS = 2000
TASK = "command"


def words_of(node: Located) -> list[str]:
    """A command's words. No shell reads them: write `sh -c '…'` for one."""
    try:
        words = shlex.split(node.text("a command"))
    except ValueError as error:
        raise node.error(f"`command` cannot be split into words: {error}") from error
    if not any("{model}" in word for word in words):
        raise node.error("`command` says nowhere what to evaluate", "Put {model} where the model's folder goes.")
    return words


def run(
    words: Sequence[str], model: Path, *, timeout_seconds: float | None = None
) -> Mapping[str, Mapping[str, float]]:
    """Run a command on a model and read its answer.

    words  with {model} for the model's folder, and {results} for a file that the command writes

    The answer is JSON, in that file or, without one, the last line printed: {"tasks": {task: {metric: number}}}
    or {metric: number}. Raises EvaluationError where the command cannot be run, fails, takes too long, or says
    something else.
    """
    with tempfile.TemporaryDirectory(prefix="streammerge-") as folder:
        results = Path(folder) / "results.json"
        places = {"{model}": str(model), "{results}": str(results)}
        given = [_filled(word, places) for word in words]
        printed = _printed(given, timeout_seconds)
        asked = any("{results}" in word for word in words)
        return _read(_file(results, given) if asked else printed.rstrip().rpartition(b"\n")[2], given)


def _filled(word: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        word = word.replace(place, value)
    return word


def _printed(words: Sequence[str], timeout_seconds: float | None) -> bytes:
    try:
        done = subprocess.run(
            words, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_seconds, check=False
        )
    except OSError as error:
        raise EvaluationError(f"{quoted(words[0])} cannot be run: {str(error.strerror).lower()}") from error
    except subprocess.TimeoutExpired as error:
        raise EvaluationError(f"{quoted(words[0])} took more than {timeout_seconds:g} seconds") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace")[-_SHOWN_CHARACTERS:].strip()
        lines = "\n  ".join(map(escaped, said.splitlines()))
        raise EvaluationError(f"{quoted(words[0])} ended with exit code {done.returncode}:\n  {lines}")
    return done.stdout


def _file(path: Path, words: Sequence[str]) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_RESULTS_BYTES + 1)
    except OSError as error:
        raise EvaluationError(f"{quoted(words[0])} wrote no results where {{results}} says") from error


def _read(text: bytes, words: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    wrong = EvaluationError(
        f"{quoted(words[0])} answered {quoted(text[:200].decode('utf-8', 'replace'))}",
        hint='Let it end with one line of JSON, such as {"accuracy": 0.5}, or write that to {results}.',
    )
    if len(text) > LARGEST_RESULTS_BYTES:
        raise wrong
    try:
        table = parse_json(text, "the answer")
    except CheckpointError as error:
        raise wrong from error
    tasks = table.get("tasks", {TASK: table}) if isinstance(table, dict) else None
    if not isinstance(tasks, dict):
        raise wrong
    found = {task: _numbers(metrics) for task, metrics in tasks.items()}
    if not any(found.values()):
        raise wrong
    return found


def _numbers(metrics: Any) -> dict[str, float]:
    table = metrics if isinstance(metrics, dict) else {}
    return {name: float(value) for name, value in table.items() if type(value) in (int, float)}
