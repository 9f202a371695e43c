"""The public face: small, typed, quick to import."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import streammerge

ROOT = Path(__file__).resolve().parent.parent


def fresh_python(code: str) -> str:
    """What a new Python prints that imports from this checkout."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]; "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_the_public_names_are_these():
    assert streammerge.__all__ == [
        "Plan", "Recipe", "Report", "StreamMergeError",
        "batch", "capture", "diagnose", "evaluate", "extract", "inspect", "merge", "plan", "verify",
    ]  # fmt: skip


def test_nothing_else_looks_public():
    public = {
        name
        for name, value in vars(streammerge).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    } - {"annotations", "Any", "TYPE_CHECKING"}
    assert public | {"Plan", "Report"} == set(streammerge.__all__)


def test_every_public_name_is_there_and_documented():
    for name in streammerge.__all__:
        value = getattr(streammerge, name)
        assert callable(value), name
        assert inspect.getdoc(value), name


def test_no_module_takes_a_public_functions_place():
    # `streammerge.plan` is a function and a module: importing the module must not replace the function
    for module in pkgutil.iter_modules(streammerge.__path__):
        if module.name != "__main__":
            importlib.import_module(f"streammerge.{module.name}")
    for name in ("inspect", "merge", "plan", "verify"):
        assert inspect.isfunction(getattr(streammerge, name)), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="`streammerge` has no attribute `unmerge`"):
        _ = streammerge.unmerge


def test_types_are_shipped():
    assert (Path(streammerge.__file__).parent / "py.typed").is_file()
    assert (ROOT / "kernels" / "streammerge_kernels" / "py.typed").is_file()


def test_every_parameter_of_the_public_functions_is_annotated():
    for name in ("inspect", "merge", "plan", "verify"):
        signature = inspect.signature(getattr(streammerge, name))
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name


@pytest.mark.parametrize("module", ["streammerge", "streammerge.cli", "streammerge.plan", "streammerge.methods"])
def test_importing_needs_neither_torch_nor_transformers(module):
    heavy = fresh_python(f"import {module}; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])")
    assert heavy == "[]"


def test_planning_and_describing_every_method_need_no_torch(family):
    code = f"""
import streammerge
from streammerge import methods
plan = streammerge.plan({{"merge_method": "actmat", "base_model": {str(family["base"])!r},
                         "models": [{{"model": {str(family["math"])!r}}}]}})
assert plan.steps and [methods.describe(name) for name in methods.names()]
print("torch" in sys.modules)
"""
    assert fresh_python(code) == "False"


def test_importing_sets_nothing_up():
    code = "import logging, streammerge; print([logging.getLogger(n).handlers for n in (None, 'streammerge')])"
    assert fresh_python(code) == "[[], []]"


def test_the_version_is_the_packages():
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written is not None
    assert streammerge.__version__ == written[1]
