"""EleutherAI's lm-evaluation-harness, through its Python interface in a process of its own.

A process gives its memory back whatever happens in it, and may be another environment's: `python` is the
interpreter of one that has `lm-eval[hf]`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streammerge.checkpoint import parse_json
from streammerge.errors import CheckpointError, EvaluationError, escaped, quoted
from streammerge.located_yaml import Located

_CHILD = Path(__file__).with_name("harness_child.py")
_NO_HARNESS = 3
_SHOWN_CHARACTERS = 2000
_LARGEST_BYTES = 100_000_000
KEYS = (
    "tasks", "include_path", "limit", "num_fewshot", "batch_size", "dtype", "device", "apply_chat_template",
    "offline", "python",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """What to ask of the harness.

    tasks         names of its tasks, or of those under `include_path`, a folder of task files
    limit         so many samples of each task; all where None
    num_fewshot   examples in the prompt; each task's own number where None
    dtype, device  as torch calls them; "auto" is the model's own
    offline       fetch nothing
    python        the interpreter that has the harness; this one where None
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "cpu"
    apply_chat_template: bool = False
    offline: bool = False
    python: str | None = None

    def run(self, model: Path, *, timeout_seconds: float | None = None) -> Mapping[str, Mapping[str, float]]:
        """Evaluate a model folder: by task and metric, which are named as the harness does but for `,none`.

        Raises EvaluationError where the harness is missing, fails or takes too long.
        """
        asked = {key: value for key, value in asdict(self).items() if key != "python"}
        include = None if self.include_path is None else os.path.abspath(self.include_path)
        asked |= {"model": str(model), "tasks": list(self.tasks), "include_path": include}
        with tempfile.TemporaryDirectory(prefix="streammerge-") as folder:
            settings, results = Path(folder) / "settings.json", Path(folder) / "results.json"
            settings.write_text(json.dumps(asked), encoding="utf-8")
            self._call([str(_CHILD), str(settings), str(results)], timeout_seconds)
            return _numbers(_table(results))

    def _call(self, arguments: Sequence[str], timeout_seconds: float | None) -> None:
        python = self.python or sys.executable
        try:
            done = subprocess.run(
                [python, *arguments],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=timeout_seconds,
                check=False,
            )
        except OSError as error:
            raise EvaluationError(f"{quoted(python)} cannot be run: {str(error.strerror).lower()}") from error
        except subprocess.TimeoutExpired as error:
            raise EvaluationError(f"the harness took more than {timeout_seconds:g} seconds") from error
        said = "\n  ".join(
            map(escaped, done.stderr.decode("utf-8", "replace")[-_SHOWN_CHARACTERS:].strip().splitlines())
        )
        if done.returncode == _NO_HARNESS:
            raise EvaluationError(
                f"{quoted(python)} has no lm-evaluation-harness:\n  {said}",
                hint="`pip install 'lm-eval[hf]'`, or name the interpreter that has it as `python`.",
            )
        if done.returncode != 0:
            raise EvaluationError(f"the harness ended with exit code {done.returncode}:\n  {said}")


def read_harness(fields: Mapping[str, Located]) -> Harness:
    """What a batch file says of the harness. Raises RecipeError with the line."""
    tasks = fields["tasks"]
    names = [task.text("a task's name") for task in tasks.items("a list of tasks")]
    if not names:
        raise tasks.wrong("a list of tasks, at least one")
    options = {key: read(fields[key]) for key, read in _READ.items() if key in fields}
    return Harness(tasks=tuple(names), **options)


def _count(node: Located) -> int:
    number = node.whole()
    if not 0 <= number < 10**9:
        raise node.wrong("a whole number, 0 or more")
    return number


_READ: Mapping[str, Callable[[Located], Any]] = {
    "include_path": Located.text, "limit": _count, "num_fewshot": _count, "batch_size": _count, "dtype": Located.text,
    "device": Located.text, "apply_chat_template": Located.truth, "offline": Located.truth, "python": Located.text,
}  # fmt: skip


def _table(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return parse_json(file.read(_LARGEST_BYTES), "the harness's answer")
    except (OSError, CheckpointError) as error:
        raise EvaluationError("the harness ended without results") from error


def _numbers(table: Any) -> dict[str, dict[str, float]]:
    results = table.get("results") if isinstance(table, dict) else None
    found = {}
    for task, metrics in results.items() if isinstance(results, dict) else ():
        # with no bootstrap a standard error is text
        numbers = {
            name.removesuffix(",none"): float(value)
            for name, value in (metrics.items() if isinstance(metrics, dict) else ())
            if type(value) in (int, float) and not name.partition(",")[0].endswith("_stderr")
        }
        if numbers:
            found[task] = numbers
    return found
