"""Regular expressions from recipes, in bounded time whatever they are.

Python's `re` goes back on its choices: `(a+)+$` takes twice as long for each further letter, and nothing stops it.
`re` is used where its steps can be counted beforehand and are few. Elsewhere all places where a part may end are kept
at once, which finds a match where one exists in any order of choices, and these steps are counted as they are taken.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from streammerge.errors import quoted

MOST_RE_STEPS = 50_000_000
MOST_STEPS = 2_000_000

# what `re` compiles patterns with has had two names
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_compiler: Any = importlib.import_module("re._compiler" if sys.version_info >= (3, 11) else "sre_compile")

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_ASSERTIONS = ("ASSERT", "ASSERT_NOT")
_LEAVES = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "CATEGORY", "RANGE")


class PatternError(ValueError):
    """Not a regular expression, or one that no bound is known for."""


class Pattern:
    """A regular expression. Raises PatternError for what is none, or could take forever on any name."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            with warnings.catch_warnings():
                # of what a later Python might read otherwise: nothing that a user of a recipe could mend
                warnings.simplefilter("ignore")
                self._compiled = re.compile(text)
                self._tree = _parser.parse(text)
            unbounded = self._ways(self._tree, 1000) is None
            self._size = _size(self._tree)
            self._kept = _kept(self._tree, self._tree.state.flags) if _is_regular(self._tree) else None
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"{quoted(text)} is not a regular expression: {error}") from error
        if unbounded and self._kept is None:
            raise PatternError(
                f"{quoted(text)} repeats what itself repeats or chooses, beside a reference or an atomic group"
            )

    def is_in(self, name: str) -> bool:
        """Whether it matches anywhere in `name`, as `re.search` finds. Raises PatternError when that takes too long."""
        ways = self._ways(self._tree, len(name))
        if ways is not None and (len(name) + 1) * ways * (self._size + len(name)) <= MOST_RE_STEPS:
            return self._compiled.search(name) is not None
        if self._kept is None:
            raise self._too_slow(name)
        run = _Run(name)
        try:
            return bool(run.ends(self._kept, frozenset(range(len(name) + 1))))
        except _TooManySteps:
            raise self._too_slow(name) from None

    def replaced(self, name: str, replacement: str) -> str:
        """`name` with each match replaced as `re.sub` does. Raises PatternError when that takes too long.

        `re` alone says what a group matched, so patterns whose steps cannot be counted beforehand are refused.
        """
        ways = self._ways(self._tree, len(name))
        if ways is None or (len(name) + 1) * ways * (self._size + len(name)) > MOST_RE_STEPS:
            raise self._too_slow(name)
        try:
            return self._compiled.sub(replacement, name)
        except (re.error, IndexError) as error:
            raise PatternError(f"{quoted(replacement)} is no replacement for {quoted(self.text)}: {error}") from error

    def _too_slow(self, name: str) -> PatternError:
        return PatternError(f"{quoted(self.text)} takes too long to look for in {quoted(name)}")

    def _ways(self, tree: Iterable[Any], length: int) -> int | None:
        """At most how many ways `re` may try from one place, in a name of a length; None where they multiply on."""
        ways = 1
        for operation, argument in tree:
            kind, own = str(operation), 1
            if kind in (*_REPEATS, "POSSESSIVE_REPEAT"):
                least, most, body = argument
                inner = self._ways(body, length)
                if inner is None:
                    return None
                if most == 1:
                    own = 1 + inner
                elif inner == 1:
                    own = 1 if least == most else max(min(int(most), length) - least, 0) + 1
                else:
                    return None
            else:
                # parts of a branch are tried one after the other, those of anything else each for each of the others
                parts = [self._ways(part, length) for part in _parts(kind, argument)]
                if None in parts:
                    return None
                own = max(sum(part or 0 for part in parts), 1)
            ways *= own
        return ways


@lru_cache(maxsize=256)
def compiled(text: str) -> Pattern:
    """A Pattern, kept for the next time."""
    return Pattern(text)


def _parts(kind: str, argument: Any) -> list[Any]:
    """The patterns inside one operation."""
    if kind == "BRANCH":
        return list(argument[1])
    if kind == "SUBPATTERN":
        return [argument[3]]
    if kind in _ASSERTIONS:
        return [argument[1]]
    if kind == "ATOMIC_GROUP":
        return [argument]
    if kind == "GROUPREF_EXISTS":
        return [part for part in argument[1:] if part is not None]
    if kind in (*_REPEATS, "POSSESSIVE_REPEAT"):
        return [argument[2]]
    return []


def _size(tree: Iterable[Any]) -> int:
    """How many operations there are, those that are repeated so many times each time."""
    total = 0
    for operation, argument in tree:
        kind = str(operation)
        times = max(argument[0], 1) if kind in (*_REPEATS, "POSSESSIVE_REPEAT") else 1
        total += times * (1 + sum(map(_size, _parts(kind, argument))))
    return total


def _is_regular(tree: Iterable[Any]) -> bool:
    """Whether what a part matches depends on nothing but where it begins."""
    known = (*_LEAVES, *_REPEATS, *_ASSERTIONS, "BRANCH", "SUBPATTERN", "FAILURE")
    return all(
        str(operation) in known and all(map(_is_regular, _parts(str(operation), argument)))
        for operation, argument in tree
    )


def _kept(tree: Any, flags: int) -> tuple[Any, ...]:
    """The tree as (kind, arguments…) with each leaf compiled by itself, under the flags that hold there."""
    kept: list[tuple[Any, ...]] = []
    for operation, argument in tree:
        kind = str(operation)
        if kind in _LEAVES:
            state = _parser.State()
            state.flags = flags
            kept.append(("LEAF", _compiler.compile(_parser.SubPattern(state, [(operation, argument)]), flags)))
        elif kind in _REPEATS:
            kept.append(("REPEAT", argument[0], int(argument[1]), _kept(argument[2], flags)))
        elif kind == "BRANCH":
            kept.append((kind, *(_kept(part, flags) for part in argument[1])))
        elif kind == "SUBPATTERN":
            kept.append(("GROUP", _kept(argument[3], (flags | argument[1]) & ~argument[2])))
        elif kind in _ASSERTIONS:
            direction, part = argument
            # what is looked for behind has one width; `re` saw to that
            back = int(part.getwidth()[0]) if direction < 0 else 0
            kept.append(("LOOK", kind == "ASSERT", back, _kept(part, flags)))
        else:
            kept.append(("NEVER",))
    return tuple(kept)


class _TooManySteps(Exception):
    """More than MOST_STEPS."""


class _Run:
    """One search: where parts may end, with the steps counted."""

    def __init__(self, name: str) -> None:
        self.name, self.left = name, MOST_STEPS

    def ends(self, kept: tuple[Any, ...], starts: frozenset[int]) -> frozenset[int]:
        """Every place where the parts, one after the other, may end when they begin at one of `starts`."""
        for kind, *arguments in kept:
            self.left -= 1 + len(starts)
            if self.left < 0:
                raise _TooManySteps
            if not starts:
                break
            if kind == "LEAF":
                found = (arguments[0].match(self.name, start) for start in starts)
                starts = frozenset(match.end() for match in found if match)
            elif kind == "BRANCH":
                starts = frozenset().union(*(self.ends(part, starts) for part in arguments))
            elif kind == "GROUP":
                starts = self.ends(arguments[0], starts)
            elif kind == "REPEAT":
                starts = self.repeated(starts, *arguments)
            elif kind == "LOOK":
                starts = self.looked(starts, *arguments)
            else:
                starts = frozenset()
        return starts

    def repeated(self, starts: frozenset[int], least: int, most: int, body: tuple[Any, ...]) -> frozenset[int]:
        for _ in range(least):
            before, starts = starts, self.ends(body, starts)
            if starts == before:
                break
        reached = new = starts
        for _ in range(most - least):
            new = self.ends(body, new) - reached
            if not new:
                break
            reached |= new
        return reached

    def looked(self, starts: frozenset[int], wanted: bool, back: int, body: tuple[Any, ...]) -> frozenset[int]:
        def holds(start: int) -> bool:
            if start < back:
                return False
            ends = self.ends(body, frozenset((start - back,)))
            return start in ends if back else bool(ends)

        return frozenset(start for start in starts if holds(start) == wanted)
