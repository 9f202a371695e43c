"""The model card: what was merged, how, under which licences, from which papers, and what evaluations measured."""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from streammerge import methods
from streammerge.errors import escaped
from streammerge.licences import Licence, agreed, differing, licence_warnings
from streammerge.plan import Plan
from streammerge.step import COPY
from streammerge.storage.hub import is_hub_id

_MARKS = "<!-- streammerge: results -->", "<!-- streammerge: end of results -->"
_BETWEEN = re.compile(rf"{re.escape(_MARKS[0])}(?:(?!{re.escape(_MARKS[0])}).)*?{re.escape(_MARKS[1])}", re.DOTALL)
# how the hub's cache calls the folder of a model
_CACHED = re.compile("models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")
_LONGEST, _MOST_ROWS = 500, 500


def model_card(plan: Plan, library: str = "transformers") -> str:
    """README.md of a merge, as the hub reads it. Text from outside is escaped, in YAML and in Markdown."""
    recipe = plan.recipe
    title = recipe.name or " + ".join(plan.names[1:] if recipe.base else plan.names)
    own = recipe.text.strip()
    # longer than any run of backticks inside, such as those of a chat template
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", own)), default=0))
    return f"""---
{_head(plan, library)}
---

# {plain(title)}

Merged with streammerge by `{recipe.method}`.
`streammerge.json` says what was done to each tensor; `streammerge verify` checks the files against it.

## Models and licences

{_models(plan)}

{_licence(plan.licences)}

## Methods

{_methods(plan)}

## Limits

{_limits(plan)}

## Recipe

{fence}yaml
{own}
{fence}
"""


def with_results(card: str, results: Mapping[str, Mapping[str, float]]) -> str:
    """A card whose table of results is this one: in place of an earlier one, else at its end. All else stays."""
    rows = [(task, metric, value) for task, metrics in results.items() for metric, value in metrics.items()]
    more = [f"\nThe first {_MOST_ROWS} of {len(rows)}."] if len(rows) > _MOST_ROWS else []
    table = "\n".join([
        _MARKS[0], "| task | metric | value |", "| --- | --- | ---: |",
        *(f"| {plain(task)} | {plain(metric)} | {value:.4g} |" for task, metric, value in rows[:_MOST_ROWS]),
        *more, _MARKS[1],
    ])  # fmt: skip
    # people's editors may have changed the ends of lines
    table = table.replace("\n", "\r\n") if "\r\n" in card else table
    changed, count = _BETWEEN.subn(lambda _: table, card, count=1)
    if count:
        return changed
    end = "\r\n" if "\r\n" in card else "\n"
    return f"{card.rstrip()}{end}{end}## Results{end}{end}{table}{end}"


def plain(text: object) -> str:
    """Text from outside as Markdown that shows it, and does nothing else."""
    shown = escaped(text)
    cut = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(cut, quote=False))


def _head(plan: Plan, library: str) -> str:
    lines = []
    # those alone that the hub knows: it refuses cards that name others
    if bases := list(dict.fromkeys(filter(None, map(_hub_name, _locations(plan, library))))):
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in bases)]
        lines.append(f"base_model_relation: {'adapter' if library == 'peft' else 'merge'}")
    lines.append(f"library_name: {library}")
    licence = agreed(plan.licences)
    if licence is not None and licence.is_identifier:
        lines += [f"{key}: {json.dumps(escaped(value))}" for key, value in licence.terms.items()]
    return "\n".join([*lines, "tags:", "- merge", "- streammerge"])


def _locations(plan: Plan, library: str) -> list[str]:
    # an adapter is one of its base, whatever it was made of
    models = plan.models[: 1 if library == "peft" else len(plan.recipe.names)]
    return [each.location for model in models for each in (model, *(model.besides if library != "peft" else ()))]


def _hub_name(location: str) -> str | None:
    """A model's name on the hub, without its commit; None for any other place."""
    parts = PurePath(location).parts
    # a folder of the hub's cache: models--ORG--NAME/snapshots/COMMIT
    cached = _CACHED.fullmatch(parts[-3]) if len(parts) > 2 and parts[-2] == "snapshots" else None
    if cached is None and os.path.lexists(location):
        return None
    name = f"{cached['owner']}/{cached['name']}" if cached else location.partition("@")[0]
    return name if is_hub_id(name) else None


def _models(plan: Plan) -> str:
    licences = {each.location: each for each in plan.licences}
    lines = []
    for number, model in enumerate(plan.models[: len(plan.recipe.names)]):
        for each in (model, *model.besides):
            role = ", an adapter" if each is not model else ", the base" if number == 0 and plan.recipe.base else ""
            licence = licences.get(each.location)
            lines.append(f"- {plain(each.location)}{role}{f': {plain(licence.told)}' if licence else ''}")
    return "\n".join(dict.fromkeys(lines))


def _licence(licences: tuple[Licence, ...]) -> str:
    if differing(licences):
        return "**The licences conflict.** Nothing is said of what holds for their merge: check what each allows."
    if licence := agreed(licences):
        return f"All models are under {plain(licence.told)}, and so is their merge as far as their cards tell."
    return "Not every model's licence is known: look for those that are missing before you pass the merge on."


def _methods(plan: Plan) -> str:
    counts: Counter[tuple[str, str]] = Counter()
    for step in plan.steps:
        for name, outer in _used(step.method, step.arguments):
            counts[name, outer] += 1
    lines = []
    for (name, outer), count in counts.most_common():
        method = methods.describe(name)
        number = (method.paper or "").removeprefix("arXiv:")
        paper = f" [arXiv:{number}](https://arxiv.org/abs/{number})" if number else ""
        inside = f", inside `{outer}`" if outer else ""
        lines.append(f"- `{name}`{inside}, of {count} tensor{'s' if count > 1 else ''}: {method.summary}{paper}")
    copied = sum(step.method == COPY for step in plan.steps)
    if copied:
        lines.append(f"- {copied} tensor{'s are' if copied > 1 else ' is'} copied as stored.")
    return "\n".join(lines)


def _used(name: str, arguments: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, str]]:
    """A method and those inside it, each with the one around it."""
    if name == COPY:
        return
    yield name, outer
    for parameter in methods.describe(name).parameters.values():
        if parameter.type == "settings":
            rule = parameter.name.removesuffix("_parameters")
            within = methods.describe(name).parameters[rule]
            settings = arguments.get(parameter.keyword) or {}
            yield from _used(str(arguments.get(within.keyword, within.default)), settings, name)


def _limits(plan: Plan) -> str:
    lines = [
        "Nothing was trained: what the models could do is not kept for certain, and neither is what they would not do. "
        "Evaluate the merge before it is used; its results, if there are any, stand in this card.",
    ]
    told_above = licence_warnings(plan.licences)
    lines += [f"A warning of the merge: {plain(warning)}" for warning in plan.warnings if warning not in told_above]
    if code := sorted(name for name in plan.models[0].files if name.endswith(".py")):
        shown = ", ".join(map(plain, code[:5])) + (", …" if len(code) > 5 else "")
        lines.append(f"Code came with a model and was copied unread: {shown}.")
    return "\n".join(f"- {line}" for line in lines)
