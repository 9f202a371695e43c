"""Single values of a recipe: a method's name, dtypes, the seed, regular expressions."""

from __future__ import annotations

from typing import Literal

from streammerge import methods, patterns
from streammerge.errors import quoted
from streammerge.located_yaml import Located, did_you_mean, nearest
from streammerge.methods import Method

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

LONGEST_REPLACEMENT = 1000

Rounding = Literal["nearest", "stochastic"]
NonFinite = Literal["refuse", "pass"]


def read_method(node: Located) -> Method:
    """The method that a recipe names."""
    name = node.text("the name of a method")
    if name not in methods.names():
        near = nearest(name, methods.names())
        hint = f"{near} `streammerge methods` lists them." if near else "`streammerge methods` lists them."
        raise node.error(f"unknown method {quoted(name)}", hint)
    return methods.describe(name)


def read_dtype(node: Located) -> str:
    """A dtype's name, also in mergekit's short form or with torch's prefix."""
    name = node.text("a dtype").removeprefix("torch.")
    if name in SHORT_DTYPES:
        return SHORT_DTYPES[name]
    if name not in DTYPES:
        raise node.error(f"unknown dtype {quoted(name)}", did_you_mean(name, [*DTYPES, *SHORT_DTYPES]))
    return name


def read_rounding(node: Located) -> Rounding:
    """How the output is rounded."""
    return "stochastic" if node.choice(("nearest", "stochastic")) == "stochastic" else "nearest"


def read_non_finite(node: Located) -> NonFinite:
    """What a NaN or an infinity does."""
    return "pass" if node.choice(("refuse", "pass")) == "pass" else "refuse"


def read_seed(node: Located) -> int:
    """Where random numbers begin."""
    seed = node.whole()
    if not 0 <= seed < 2**63:
        raise node.wrong("a whole number from 0 to 2^63 - 1")
    return seed


def read_regex(node: Located) -> str:
    """A regular expression, in the form that it was written; `patterns` bounds its time."""
    pattern = node.text("a regular expression")
    try:
        patterns.compiled(pattern)
    except patterns.PatternError as error:
        raise node.error(str(error), "Quote it in YAML with single quotes: '…'.") from error
    return pattern


def read_key_map(node: Located) -> tuple[tuple[str, str], ...]:
    """Regular expressions and what they are replaced by, in the order written."""
    rules = []
    for pattern, value in node.mapping("a mapping of patterns to replacements").items():
        replacement = value.text("a replacement, such as `''` or `model.\\1`")
        try:
            # a replacement is read before anything is looked for
            patterns.compiled(pattern).replaced("", replacement)
        except patterns.PatternError as error:
            raise value.error(str(error), "Quote patterns and replacements in YAML with single quotes: '…'.") from error
        if len(replacement) > LONGEST_REPLACEMENT:
            raise value.error(f"a replacement of more than {LONGEST_REPLACEMENT} characters")
        rules.append((pattern, replacement))
    return tuple(rules)
