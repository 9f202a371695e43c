import inspect
import subprocess
import sys
import typing

import pytest

from streammerge import methods
from streammerge.delta import Deltas, MethodName, PerExpert, Settings
from streammerge.solve.cost import Cost


@pytest.mark.parametrize("name", methods.names())
def test_a_declaration_read_from_source_agrees_with_the_function(name):
    declared = methods.describe(name)
    function = declared.load()
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function)
    stream, *settable = signature.parameters.values()
    assert hints[stream.name] is Deltas
    assert [p.name for p in settable] == [p.keyword for p in declared.parameters.values()]
    for parameter in settable:
        described = declared.parameters[parameter.name.rstrip("_")]
        hint = hints[parameter.name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert described.default == parameter.default
        assert described.per_expert == (hint == PerExpert)
        if typing.get_origin(hint) is typing.Literal:
            assert described.choices == typing.get_args(hint)
        elif hint == Settings:
            assert described.type == "settings"
        elif described.type == "method":
            assert hint is MethodName
        elif not described.per_expert:
            assert described.type == hint.__name__


@pytest.mark.parametrize("name", methods.names())
def test_a_method_explains_every_parameter_and_names_its_paper(name):
    declared = methods.describe(name)
    assert declared.paper
    assert len(declared.summary) <= 80
    for parameter in declared.parameters.values():
        assert parameter.summary, f"{name}: no line about {parameter.name}"


@pytest.mark.parametrize("name", methods.names())
def test_a_method_can_be_priced_without_parameters(name):
    assert isinstance(methods.describe(name).cost((64, 32), 3, {}, 4), Cost)


def test_describing_and_pricing_load_no_torch():
    code = (
        "import sys; from streammerge import methods; "
        "[methods.describe(n).cost((8, 8), 2, {}, 4) for n in methods.names()]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
