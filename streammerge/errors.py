"""The errors a user can act on.

StreamMergeError
├── RecipeError        the recipe says something impossible or unknown
├── CheckpointError    an input model's files are not what they claim
├── PlanError          models that do not fit together, or a budget or disk too small
├── MergeError         a tensor that cannot be merged: NaN, overflow, a system without a solution
├── OutputError        the output folder cannot be written, resumed or trusted
└── EvaluationError    a model could not be evaluated
"""

from __future__ import annotations

from collections.abc import Sequence

# lines of one message: more would push its beginning off the screen
MOST_LISTED = 20


class StreamMergeError(Exception):
    """Something the user can mend: `message` says what was found and expected, `hint` what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(StreamMergeError):
    """The recipe says something impossible or unknown."""


class CheckpointError(StreamMergeError):
    """An input model's files are not what they claim."""


class PlanError(StreamMergeError):
    """The models do not fit together, or the budget or disk is too small."""


class MergeError(StreamMergeError):
    """A tensor cannot be merged: NaN, overflow, or a system without a solution."""


class OutputError(StreamMergeError):
    """The output folder cannot be written, resumed or trusted."""


class EvaluationError(StreamMergeError):
    """A model could not be evaluated: the harness is missing, failed, or answered nothing."""


def escaped(text: object) -> str:
    """Text from outside, with anything a terminal could act on escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def quoted(name: object) -> str:
    """A name from outside, in backticks, escaped and not too long to read."""
    # cut before it is escaped too: a name may have the length of a header
    text = escaped(str(name)[:201])
    return f"`{text[:200]}…`" if len(text) > 200 else f"`{text}`"


def listed(lines: Sequence[str]) -> str:
    """Lines to go below a message: the first of them, and how many more there are."""
    more = [f"and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
    return "".join(f"\n  {line}" for line in (*lines[:MOST_LISTED], *more))
