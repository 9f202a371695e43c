"""Evaluate a merged folder with a harness, in a process of its own, and keep what it says beside the model."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from streammerge.card import with_results
from streammerge.errors import EvaluationError, escaped, quoted
from streammerge.evaluation import command, harness
from streammerge.licences import CARD_NAME
from streammerge.located_yaml import Located

logger = logging.getLogger(__name__)

RESULTS_NAME = "results.json"
_LARGEST_CARD_BYTES = 16 << 20

Results = Mapping[str, Mapping[str, float]]
"""By task and metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How models are evaluated: `run` is called with the model's folder."""

    run: Callable[[Path], Results]


def read_evaluation(node: Located) -> Evaluation:
    """What `evaluate` in a batch says. Raises RecipeError with the line."""
    fields = node.fields(("command", "timeout_seconds", *harness.KEYS))
    timeout = fields["timeout_seconds"].number() if "timeout_seconds" in fields else None
    if ("command" in fields) == ("tasks" in fields):
        found = "names two harnesses" if "tasks" in fields else "names no harness"
        hint = "Set `tasks` for the lm-evaluation-harness, or `command` with {model} where the folder goes."
        raise node.error(f"`evaluate` {found}", hint)
    if "tasks" in fields:
        asked = harness.read_harness(fields)
        return Evaluation(run=lambda model: asked.run(model, timeout_seconds=timeout))
    words = command.words_of(fields["command"])
    return Evaluation(run=lambda model: command.run(words, model, timeout_seconds=timeout))


def evaluate(model: Path, evaluation: Evaluation) -> Results:
    """Evaluate a model, write `results.json` into its folder, and the numbers into its card, if it has one.

    Raises EvaluationError where the harness fails, or answers no finite number.
    """
    results = evaluation.run(model)
    found = {
        task: {metric: value for metric, value in metrics.items() if math.isfinite(value)}
        for task, metrics in results.items()
    }
    if not any(found.values()):
        raise EvaluationError(f"the harness gave no number for {quoted(model)}", hint="Look at what it printed.")
    _replace(model / RESULTS_NAME, (json.dumps({"tasks": found}, indent=2) + "\n").encode())
    _tell_card(model / CARD_NAME, found)
    return found


def _tell_card(card: Path, results: Results) -> None:
    """Put the results into a card that somebody may have written on: what cannot be done is told, and loses nothing."""
    try:
        if not card.is_file() or card.is_symlink():
            return
        if card.stat().st_size > _LARGEST_CARD_BYTES:
            raise ValueError(f"more than {_LARGEST_CARD_BYTES} bytes")
        text = card.read_bytes().decode()
        _replace(card, with_results(text, results).encode())
    except (OSError, ValueError) as error:
        logger.warning("%s was left without the results: %s", quoted(card), escaped(error))


def _replace(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}.partial")
    staged.write_bytes(data)
    os.replace(staged, path)
