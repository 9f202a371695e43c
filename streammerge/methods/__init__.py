"""The merge methods: one file each, one table line each, described without importing torch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from streammerge.errors import MergeError, quoted
from streammerge.intervals import Interval
from streammerge.solve.cost import Cost

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.delta import Deltas
    from streammerge.solve.thin import Factors

METHODS: dict[str, str] = {
    "linear": "streammerge.methods.linear",
    "task_arithmetic": "streammerge.methods.task_arithmetic",
    "actmat": "streammerge.methods.actmat",
    "tact": "streammerge.methods.tact",
    "wudi": "streammerge.methods.wudi",
    "swudi": "streammerge.methods.swudi",
    "aswudi": "streammerge.methods.aswudi",
    "ace": "streammerge.methods.ace",
    "regmean": "streammerge.methods.regmean",
    "fisher": "streammerge.methods.fisher",
    "tsv": "streammerge.methods.tsv",
    "iso_c": "streammerge.methods.iso_c",
    "iso_cts": "streammerge.methods.iso_cts",
    "knots": "streammerge.methods.knots",
    "svc": "streammerge.methods.svc",
    "fr": "streammerge.methods.fr",
    "resmerge": "streammerge.methods.resmerge",
    "larv": "streammerge.methods.larv",
    "ties": "streammerge.methods.ties",
    "dare_linear": "streammerge.methods.dare_linear",
    "dare_ties": "streammerge.methods.dare_ties",
    "della": "streammerge.methods.della",
    "della_linear": "streammerge.methods.della_linear",
    "breadcrumbs": "streammerge.methods.breadcrumbs",
    "breadcrumbs_ties": "streammerge.methods.breadcrumbs_ties",
    "sce": "streammerge.methods.sce",
    "model_stock": "streammerge.methods.model_stock",
    "ram": "streammerge.methods.ram",
    "ramplus_tl": "streammerge.methods.ramplus_tl",
    "from": "streammerge.methods.from_",
    "slerp": "streammerge.methods.slerp",
    "nuslerp": "streammerge.methods.nuslerp",
    "multislerp": "streammerge.methods.multislerp",
    "karcher": "streammerge.methods.karcher",
    "nearswap": "streammerge.methods.nearswap",
    "arcee_fusion": "streammerge.methods.arcee_fusion",
    "passthrough": "streammerge.methods.passthrough",
}

Function = TypeVar("Function", bound=Callable[..., Any])
StreamsBy = Literal["element", "row", "matrix"]
Beside = Literal["covariance", "fisher"]


def merge_method(
    *,
    needs_base: bool,
    streams_by: StreamsBy,
    paper: str | None = None,
    cost: str = "streammerge.solve.cost:elementwise",
    takes_base: bool = False,
    look: str | None = None,
    beside: Beside | None = None,
    thin: str | None = None,
    thin_cost: str | None = None,
    for_adapters: str | None = None,
    experts: tuple[int, int | None] = (1, None),
    ranges: Mapping[str, str] | None = None,
    checks: Mapping[str, str] | None = None,
    thin_checks: Mapping[str, str] | None = None,
    one_for_all: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Declare facts the planner needs about a method. Every argument must be a literal.

    needs_base   the method works on changes from a common base model
    takes_base   it does so where the recipe names a base, and else works on the weights (`deltas.based` says which)
    streams_by   "element": any run of elements may be merged by itself, so tensors are cut into
                 blocks and the method applies to every float tensor;
                 "row": the same with blocks of whole rows, deltas.shape = [rows, columns];
                 "matrix": the method needs a whole [out, in] matrix and applies to linear weights
    paper        "arXiv:…" of the method
    cost         "module:function" that prices one tensor without torch (see `solve/cost.py`)
    look         "module:Class" of what a method must know of the whole tensor or model first (see `Look`)
    beside       what each expert must bring beside its weights: a folder that the recipe names
    thin         "module:function" that merges low-rank changes as factors (see `solve/thin.py`), with the same settings
    thin_cost    "module:function" that prices it, or says for which settings only the function itself will do; of a
                 method by matrix, which then merges adapters so
    for_adapters "module:function" that gives the arguments where every expert is an adapter, of these and their ranks
    experts      how many it takes: at least, and at most, or None for any number
    ranges       parameter -> the interval of its values, as "[0, 1]" or "(0, inf)"; any number without one
    checks       parameter -> "module:function" that refuses its value beside the others' (see `solve/limits.py`)
    thin_checks  the same, of what cannot be done with factors alone
    one_for_all  parameters that have one value for all tensors where the method looks at the whole model

    A setting is refused by these when the merge is planned: the function itself need not look.
    The function itself is returned unchanged: its first parameter is the stream of deltas, and its
    keyword-only parameters, annotated and with literal defaults, are what a recipe may set.
    """
    del needs_base, streams_by, paper, cost, takes_base, look, beside, thin, thin_cost, for_adapters, experts, ranges
    del checks, thin_checks, one_for_all

    def declared(function: Function) -> Function:
        return function

    return declared


class Look(Protocol):
    """What a method knows of a whole tensor before its first block is merged; the method finds it in `deltas.seen`.

    Made of the first block's deltas and the method's arguments. As many passes are made as the price says, each over
    all blocks in order. What is seen must not depend on how the tensor was cut. A method by matrix looks at the whole
    model, where matrices are its blocks.
    """

    def look(self, number: int, deltas: Deltas) -> None:
        """See one block, in pass `number`."""

    def finish(self, number: int) -> None:
        """All blocks were seen in pass `number`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What a recipe may set: its type name ("float", "int", "bool", "str", "method", "settings"), or its choices.

    A "method" is the name of another one, and "settings" are that one's parameters, as a mapping.
    `method` is whose it is.
    `keyword` is the function's argument; it differs from `name` where Python reserves the name (`lambda`).
    """

    name: str
    method: str
    keyword: str
    type: str
    choices: tuple[str, ...]
    default: object
    per_expert: bool
    summary: str
    interval: Interval | None = None


class Complaint(NamedTuple):
    """Why a method cannot merge: the parameter that is to blame, None for the number of experts, and what to do."""

    parameter: str | None
    message: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A merge method as its file declares it."""

    name: str
    module: str
    summary: str
    doc: str
    needs_base: bool
    streams_by: StreamsBy
    paper: str | None
    parameters: Mapping[str, Parameter]
    cost_path: str
    takes_base: bool
    look_path: str | None
    beside: Beside | None
    thin_path: str | None
    thin_cost_path: str | None
    for_adapters_path: str | None
    experts: tuple[int, int | None]
    check_paths: Mapping[str, str]
    thin_check_paths: Mapping[str, str]
    one_for_all: tuple[str, ...]

    @property
    def notes(self) -> str:
        """The formula, and how it differs from the paper's: the docstring without summary, parameters and results."""
        paragraphs = self.doc.split("\n\n")[1:]
        table = re.compile(rf"({'|'.join(map(re.escape, self.parameters)) or '$.'})[, ]")
        kept = [text for text in paragraphs if not table.match(text) and not text.startswith(("Returns", "Raises"))]
        return "\n\n".join(kept)

    def cost(self, shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
        """Price one [out, in] matrix: workspace in bytes, FLOPs, passes over the experts and looks before."""
        priced: Cost = _found(self.cost_path)(shape, experts, parameters, itemsize)
        return priced

    def thin_cost(
        self, shape: tuple[int, int], ranks: Sequence[int], parameters: Mapping[str, Any], itemsize: int
    ) -> Cost | None:
        """Price one [out, in] matrix whose experts changed it by so many ranks; None where it is merged in full."""
        if self.thin_cost_path is None:
            return None
        priced: Cost | None = _found(self.thin_cost_path)(shape, ranks, parameters, itemsize)
        return priced

    def for_adapters(
        self, arguments: Mapping[str, Any], shape: tuple[int, int], ranks: Sequence[int]
    ) -> Mapping[str, Any]:
        """The arguments for experts that all changed an [out, in] matrix by so many ranks, 0 where by nothing."""
        if self.for_adapters_path is None:
            return arguments
        fitting: Mapping[str, Any] = _found(self.for_adapters_path)(arguments, shape, ranks)
        return fitting

    def complaint(self, shape: tuple[int, int], experts: int, parameters: Mapping[str, Any]) -> Complaint | None:
        """What keeps the method from merging [out, in] matrices of so many experts with these arguments, if anything.

        Everything that needs no weight to be known, also of the method inside one that wraps another.
        """
        fewest, most = self.experts
        if not fewest <= experts <= (most or experts):
            wanted = f"{fewest} model{'s' if fewest > 1 else ''}" + ("" if most == fewest else " or more")
            beside = " beside `base_model`" if self.needs_base else ""
            return Complaint(None, f"{quoted(self.name)} merges {wanted}, found {experts}", f"List {wanted}{beside}.")
        arguments = self._with_defaults(parameters)
        for each in self.parameters.values():
            value = arguments[each.keyword]
            numbers = value if isinstance(value, Sequence) else [value]
            outside = [number for number in numbers if each.interval and number not in each.interval]
            if outside:
                found = f"{quoted(each.name)} is {outside[0]:g}, expected {each.interval}"
                return Complaint(each.name, found, f"`streammerge methods {self.name}` explains `{each.name}`.")
        if refused := _refused(self.check_paths, arguments, shape, experts):
            return refused
        wrapped = self.wrapped(arguments)
        return self._complaint_about(*wrapped, shape, experts) if wrapped else None

    def thin_complaint(self, shape: tuple[int, int], experts: int, parameters: Mapping[str, Any]) -> Complaint | None:
        """What keeps the method from merging low-rank changes as factors, where no base is at hand."""
        return _refused(self.thin_check_paths, self._with_defaults(parameters), shape, experts)

    def _with_defaults(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {**{each.keyword: each.default for each in self.parameters.values()}, **parameters}

    def wrapped(self, parameters: Mapping[str, Any]) -> tuple[Method, dict[str, Any]] | None:
        """The method that this one wraps, where it wraps any, and that one's arguments as far as they are set."""
        inside = next((each for each in self.parameters.values() if each.type == "settings"), None)
        if inside is None:
            return None
        rule = self.parameters[inside.name.removesuffix("_parameters")]
        method = describe(parameters.get(rule.keyword, rule.default))
        given = parameters.get(inside.keyword) or {}
        return method, {method.parameters[name.rstrip("_")].keyword: value for name, value in given.items()}

    def _complaint_about(
        self, inner: Method, arguments: Mapping[str, Any], shape: tuple[int, int], experts: int
    ) -> Complaint | None:
        rule = next(each.name for each in self.parameters.values() if each.type == "method")
        cannot = f"{quoted(self.name)} cannot wrap {quoted(inner.name)}, which"
        if inner.beside:
            needs = f"{cannot} needs a {inner.beside} beside each expert"
            return Complaint(rule, needs, f"Use {quoted(inner.name)} by itself, or another rule.")
        found = inner.complaint(shape, experts, arguments)
        if found:
            parameter = rule if found.parameter is None else f"{rule}_parameters"
            return found._replace(parameter=parameter, message=f"{found.message}, inside {quoted(self.name)}")
        if inner.cost(shape, experts, arguments, 4).look_scope == "model":
            looks = f"{cannot} looks at the whole model first"
            parameter = f"{rule}_parameters" if arguments else rule
            return Complaint(parameter, looks, "Choose parameters that look at one tensor, or another rule.")
        return None

    def load_thin(self) -> Callable[..., Factors]:
        """Import the function for factors, torch with it."""
        assert self.thin_path is not None, f"{self.name} has no thin form"
        function: Callable[..., Factors] = _found(self.thin_path)
        return function

    def load(self) -> Callable[..., Tensor]:
        """Import the function itself; this is where torch comes in."""
        function: Callable[..., Tensor] = getattr(_module(self.module), _function_name(self.name))
        return function

    def look(self, deltas: Deltas, arguments: Mapping[str, Any]) -> Look:
        """A new look, of the first block's deltas."""
        assert self.look_path is not None, f"{self.name} takes no look"
        look: Look = _found(self.look_path)(deltas, **arguments)
        return look

    def merge(self, deltas: Deltas, **arguments: Any) -> Tensor:
        """Merge a whole tensor as one block, and as the whole model: its looks, then the function.

        Raises MergeError for arguments that no plan would let through.
        """
        columns = deltas.shape[-1] if deltas.shape else 1
        rows = math.prod(deltas.shape[:-1])
        if found := self.complaint((rows, columns), deltas.experts, arguments):
            raise MergeError(f"{quoted(deltas.name)}: {found.message}", hint=found.hint)
        looks = self.cost((rows, columns), deltas.experts, arguments, deltas.dtype.itemsize).looks
        # a method that wraps this one may have left its own there
        deltas.seen = self.look(deltas, arguments) if looks else None
        for number in range(looks):
            deltas.seen.look(number, deltas)
            deltas.seen.finish(number)
        return self.load()(deltas, **arguments)


def _refused(
    checks: Mapping[str, str], arguments: Mapping[str, Any], shape: tuple[int, int], experts: int
) -> Complaint | None:
    for name, path in checks.items():
        refused: tuple[str, str] | None = _found(path)(arguments, shape, experts)
        if refused:
            return Complaint(name, *refused)
    return None


def _found(path: str) -> Any:
    """What a "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(_module(module), name)


# looking an imported module up takes longer than what is asked of it for a tensor
_module = cache(importlib.import_module)


@cache
def _describe(name: str, module: str) -> Method:
    # reading the source instead of importing it keeps `plan` and `methods` free of torch
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"methods table: no module {module}"
    assert spec.origin is not None, f"methods table: {module} is not a source file"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == _function_name(name))
    call = next(
        d
        for d in function.decorator_list
        if isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "merge_method"
    )
    facts = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    doc = ast.get_docstring(function) or ""
    ranges = {name: Interval.parse(text) for name, text in facts.get("ranges", {}).items()}
    declared = [
        _parameter(name, argument, default, doc, ranges)
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    ]
    return Method(
        name=name,
        module=module,
        summary=doc.partition("\n")[0],
        doc=doc,
        needs_base=facts["needs_base"],
        streams_by=facts["streams_by"],
        paper=facts.get("paper"),
        parameters={parameter.name: parameter for parameter in declared},
        cost_path=facts.get("cost", "streammerge.solve.cost:elementwise"),
        takes_base=facts.get("takes_base", False),
        look_path=facts.get("look"),
        beside=facts.get("beside"),
        thin_path=facts.get("thin"),
        thin_cost_path=facts.get("thin_cost"),
        for_adapters_path=facts.get("for_adapters"),
        experts=facts.get("experts", (1, None)),
        check_paths=facts.get("checks", {}),
        thin_check_paths=facts.get("thin_checks", {}),
        one_for_all=facts.get("one_for_all", ()),
    )


def _function_name(method: str) -> str:
    # Python reserves some names, such as `from`
    return f"{method}_" if keyword.iskeyword(method) else method


_TYPES = {"PerExpert": "float", "MethodName": "method", "Settings": "settings"}


def _parameter(
    method: str, argument: ast.arg, default: ast.expr | None, doc: str, ranges: Mapping[str, Interval]
) -> Parameter:
    assert argument.annotation is not None, f"parameter {argument.arg} needs an annotation"
    assert default is not None, f"parameter {argument.arg} needs a default"
    annotation = ast.unparse(argument.annotation)
    name = argument.arg.rstrip("_")
    choices: tuple[str, ...] = ()
    if annotation.startswith("Literal["):
        choices = tuple(re.findall(r"'([^']*)'", annotation))
    return Parameter(
        name=name,
        method=method,
        keyword=argument.arg,
        type=_TYPES.get(annotation, "str" if choices else annotation),
        choices=choices,
        default=ast.literal_eval(default),
        per_expert=annotation == "PerExpert",
        summary=_line_about(name, doc),
        interval=ranges.get(name),
    )


def _line_about(parameter: str, doc: str) -> str:
    """The docstring's table entry for a parameter, continuation lines joined."""
    found = re.search(rf"^{parameter}[ ]{{2,}}(.+(?:\n[ ]{{4,}}.+)*)", doc, re.MULTILINE)
    return re.sub(r"\s+", " ", found.group(1)) if found else ""


def names() -> list[str]:
    """Every method's name, in the table's order."""
    return list(METHODS)


def describe(name: str) -> Method:
    """A method's declaration. Raises KeyError for a name that is not in the table."""
    return _describe(name, METHODS[name])
