"""The verb that explains: `methods`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from streammerge import methods
from streammerge.budget import format_bytes
from streammerge.errors import StreamMergeError, quoted
from streammerge.options import json_option
from streammerge.solve.cost import Cost

_EXAMPLE, _EXAMPLE_SHAPE, _EXAMPLE_EXPERTS = "a 4096 x 4096 matrix of 3 experts", (4096, 4096), 3


@click.command("methods")
@click.argument("name", required=False)
@json_option
def list_methods(name: str | None, as_json: bool) -> None:
    """List merge methods, or explain one."""
    if name is None:
        described = [methods.describe(each) for each in methods.names()]
        if as_json:
            click.echo(json.dumps({m.name: m.summary for m in described}))
            return
        width = max(len(m.name) for m in described)
        for method in described:
            click.echo(f"{method.name:{width}}  {method.summary}")
        return
    if name not in methods.names():
        raise StreamMergeError(f"unknown method {quoted(name)}", hint="`streammerge methods` lists them.")
    method = methods.describe(name)
    click.echo(json.dumps(_method_json(method)) if as_json else _method_text(method))


def _method_text(method: methods.Method) -> str:
    lines = [f"{method.name}   {method.summary}", ""]
    width = max((len(name) for name in method.parameters), default=0)
    for parameter in method.parameters.values():
        scope = ", per model" if parameter.per_expert else ""
        choices = f" ({' | '.join(parameter.choices)})" if parameter.choices else ""
        interval = f"; {parameter.interval}" if parameter.interval else ""
        about = f"{parameter.summary}{choices}{interval}; default {parameter.default}{scope}"
        lines.append(f"  {parameter.name:{width}}  {about}")
    if method.notes:
        lines += ["", *(f"  {line}".rstrip() for line in method.notes.splitlines())]
    base = "needs a base" if method.needs_base else "needs no base"
    data = f" · needs a {method.beside} of each expert" if method.beside else ""
    paper = f" · https://arxiv.org/abs/{method.paper.removeprefix('arXiv:')}" if method.paper else ""
    cost = _example_cost(method)
    readings = cost.looks + cost.passes
    passes = "once" if readings == 1 else f"{readings} times"
    beside = f", {format_bytes(cost.workspace_bytes)} beside them" if method.streams_by == "matrix" else ""
    return "\n".join(
        [
            *lines,
            "",
            f"  {_EXAMPLE}: {cost.flops / 1e12:.3g} TFLOP, inputs read {passes}{beside}",
            f"  streams by {method.streams_by} · {base}{data}{paper}",
        ]
    )


def _example_cost(method: methods.Method) -> Cost:
    """What the method takes by its defaults for one matrix of float32 arithmetic."""
    defaults = {parameter.keyword: parameter.default for parameter in method.parameters.values()}
    return method.cost(_EXAMPLE_SHAPE, _EXAMPLE_EXPERTS, defaults, 4)


def _method_json(method: methods.Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "needs_base": method.needs_base,
        "streams_by": method.streams_by,
        "beside": method.beside,
        "notes": method.notes,
        "cost": {"of": _EXAMPLE, **asdict(_example_cost(method))},
        "parameters": {
            p.name: {
                "type": p.type,
                "choices": list(p.choices),
                "range": str(p.interval) if p.interval else None,
                "default": p.default,
                "per_model": p.per_expert,
                "summary": p.summary,
            }
            for p in method.parameters.values()
        },
    }
