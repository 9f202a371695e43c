from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streammerge import methods
from streammerge.methods import Method, Parameter, describe, merge_method
from streammerge.solve.cost import Cost

FAKE = '''
"""A method with a parameter of every kind. Importing it fails, describing it must not."""

from __future__ import annotations

from typing import Literal

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method

raise ImportError("described, not imported")


def helper() -> None:
    """Not a method."""


@unrelated
@merge_method(paper="arXiv:2601.00001", needs_base=True, streams_by="matrix", cost="fake_cost:price")
def woven(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    lambda_: float = -0.5,
    rank: int = 4,
    cap: int | None = None,
    rescale: bool = False,
    sign: Literal["sum", "count"] = "sum",
    label: str = "x",
) -> object:
    """Weave the experts' changes.

    weight   share of each expert;
             only ratios matter
    lambda   factor of the merged change

    rank  how many directions are kept

    The weight of evidence is mentioned here, and a sign too, but not in the table.
    """


@merge_method(needs_base=False, streams_by="element")
def plain(deltas: Deltas) -> object:
    return None
'''

COST = """
from streammerge.solve.cost import Cost


def price(shape, experts, parameters, itemsize):
    return Cost(workspace_bytes=shape[0] * shape[1] * itemsize, flops=experts, passes=parameters["rank"])
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two methods in one file of their own, in the table."""
    # a module of its own for each test: descriptions are remembered
    module = f"fake_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(FAKE)
    (tmp_path / "fake_cost.py").write_text(COST)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("woven", "plain"):
        monkeypatch.setitem(methods.METHODS, name, module)
    return tmp_path


@pytest.fixture
def woven(fake: Path) -> Method:
    return describe("woven")


def parameter(name: str, **facts: Any) -> Parameter:
    rest: Mapping[str, Any] = {
        "method": "woven",
        "keyword": name,
        "choices": (),
        "per_expert": False,
        "summary": "",
        **facts,
    }
    return Parameter(name=name, **rest)


def test_a_method_is_described_from_its_source_without_running_it(woven: Method) -> None:
    assert woven.summary == "Weave the experts' changes."
    assert woven.doc.startswith(woven.summary)
    assert (woven.needs_base, woven.streams_by) == (True, "matrix")
    assert (woven.paper, woven.cost_path) == ("arXiv:2601.00001", "fake_cost:price")
    assert woven.module not in sys.modules
    with pytest.raises(ImportError, match="described, not imported"):
        woven.load()


def test_its_parameters_are_its_keyword_only_arguments(woven: Method) -> None:
    assert list(woven.parameters.values()) == [
        parameter(
            "weight",
            type="float",
            default=1.0,
            per_expert=True,
            summary="share of each expert; only ratios matter",
        ),
        parameter("lambda", keyword="lambda_", type="float", default=-0.5, summary="factor of the merged change"),
        parameter("rank", type="int", default=4, summary="how many directions are kept"),
        parameter("cap", type="int | None", default=None),
        parameter("rescale", type="bool", default=False),
        parameter("sign", type="str", choices=("sum", "count"), default="sum"),
        parameter("label", type="str", default="x"),
    ]


def test_what_is_not_declared_has_a_default(fake: Path) -> None:
    plain = describe("plain")
    assert (plain.paper, plain.summary, plain.doc, dict(plain.parameters)) == (None, "", "", {})
    assert plain.cost_path == "streammerge.solve.cost:elementwise"
    assert plain.cost((2, 3), 5, {}, 4) == Cost(workspace_bytes=0, flops=60, passes=1)


def test_a_methods_own_price_is_asked_for(woven: Method) -> None:
    assert woven.cost((10, 20), 3, {"rank": 2}, 8) == Cost(workspace_bytes=1600, flops=3, passes=2)


def test_the_table_names_methods_in_its_order(fake: Path) -> None:
    assert methods.names()[-2:] == ["woven", "plain"]
    assert methods.names()[:3] == ["linear", "task_arithmetic", "actmat"]


def test_a_name_that_is_not_in_the_table_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="woven"):
        describe("woven")


def test_a_table_line_that_leads_nowhere_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "lost", "streammerge.methods.lost")
    with pytest.raises(AssertionError, match=r"methods table: no module streammerge\.methods\.lost"):
        describe("lost")


@pytest.mark.parametrize(
    ("argument", "reason"),
    [("density=0.5", "parameter density needs an annotation"), ("density: float", "parameter density needs a default")],
)
def test_a_parameter_must_say_its_type_and_default(
    argument: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"careless_{len(argument)}"
    source = f'@merge_method(needs_base=True, streams_by="element")\ndef careless(deltas, *, {argument}): ...\n'
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.METHODS, "careless", module)
    with pytest.raises(AssertionError, match=reason):
        describe("careless")


def test_declaring_returns_the_function_itself() -> None:
    def function(deltas: object) -> None: ...

    declared = merge_method(needs_base=True, streams_by="matrix", paper="arXiv:1", cost="a:b")(function)
    assert declared is function


def test_every_file_of_methods_is_in_the_table() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert {module.rpartition(".")[2] for module in methods.METHODS.values()} == files


@pytest.mark.parametrize("name", methods.names())
def test_the_methods_text_says_what_the_declaration_says(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "streammerge", "methods", name], capture_output=True, text=True, check=True
    )
    text, method = done.stdout, describe(name)
    assert text.splitlines()[0] == f"{name}   {method.summary}"
    assert f"streams by {method.streams_by}" in text
    assert ("needs a base" in text, "needs no base" in text) == (method.needs_base, not method.needs_base)
    assert method.paper
    assert f"https://arxiv.org/abs/{method.paper.removeprefix('arXiv:')}" in text
    for each in method.parameters.values():
        line = next(line for line in text.splitlines() if line.startswith(f"  {each.name} "))
        assert each.summary in line
        interval = f"; {each.interval}" if each.interval else ""
        assert f"{interval}; default {each.default}" in line
        assert line.endswith(", per model") == each.per_expert
