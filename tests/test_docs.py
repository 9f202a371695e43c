"""What the documents say is true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

import streammerge
from streammerge import methods
from streammerge.batching import read_night
from streammerge.cli import cli
from streammerge.delta import TensorDeltas
from streammerge.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
SECURITY = (ROOT / "SECURITY.md").read_text()


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no section {title}"
    return found.group(1)


def test_the_first_code_stands_by_line_20():
    first = next(number for number, line in enumerate(README.splitlines(), 1) if line.startswith("```"))
    assert first <= 20


def test_the_file_map_names_every_source_file_and_no_other():
    mapped = set(re.findall(r"^\| `([^`]+)`", section(README, "Files"), re.MULTILINE))
    sources = {
        str(path.relative_to(ROOT))
        for folder in ("streammerge", "kernels", "demo", "bench")
        for path in (ROOT / folder).rglob("*.py")
        # an `__init__.py` that only says what its folder is needs no line
        if path.name != "__init__.py" or len(path.read_text().splitlines()) > 30
    }
    assert mapped - {"tests/"} == sources


def test_every_option_of_every_verb_is_in_the_readme_and_has_help():
    for verb, command in cli.commands.items():
        assert f"streammerge {verb}" in README, verb
        assert command.help, verb
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{verb} {parameter.name}"
                assert f"`{max(parameter.opts, key=len)}" in README, f"{verb} {parameter.opts}"


def test_every_command_in_the_documents_exists_with_its_options():
    lines = re.findall(r"^\$? ?streammerge (.+)$", README, re.MULTILINE)
    assert lines
    for line in lines:
        verb = line.split()[0]
        assert verb in cli.commands, line
        known = {option for parameter in cli.commands[verb].params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", line)) <= known, line


def test_every_verbs_help_shows_the_whole_first_sentence():
    shown = CliRunner().invoke(cli, ["--help"]).output
    for command in cli.commands.values():
        assert "..." not in command.get_short_help_str(80)
        assert command.get_short_help_str(80) in shown


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)\b", README + CONTRIBUTING + SECURITY))
    assert {"demo", "test"} <= named <= targets


def test_the_readmes_recipes_are_valid():
    files = [yaml.safe_load(text) for text in fenced(README, "yaml")]
    recipes = [mapping for mapping in files if "merge_method" in mapping]
    assert recipes
    for mapping in recipes:
        Recipe.from_dict(mapping)


def test_the_readmes_batch_is_valid(tmp_path, monkeypatch):
    recipe = next(text for text in fenced(README, "yaml") if text.startswith("merge_method: actmat"))
    (night,) = (text for text in fenced(README, "yaml") if "jobs:" in text)
    for name, text in (("recipe.yaml", recipe), ("night.yaml", night)):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert len(read_night("night.yaml").jobs) == 7


def test_every_method_is_in_the_readme():
    for name in methods.names():
        assert f"`{name}`" in README, name


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in section(README, "Install")


def test_the_functions_on_a_tensors_way_exist():
    told = section(CONTRIBUTING, "The life of a tensor")
    where: str | None = None
    for names, file in re.findall(r"((?:`[A-Za-z_.]+`(?:,? and |, )?)+)[^(`]*\(`([a-z_/]+)\.py`\)", told):
        package = "" if file.startswith("streammerge_kernels") else "streammerge."
        module = importlib.import_module(package + file.replace("/", "."))
        for name in re.findall(r"`([A-Za-z_.]+)`", names):
            where = f"{file}.{name}"
            target = module
            for part in name.split("."):
                assert hasattr(target, part), where
                target = getattr(target, part)
    assert where


def test_the_worked_example_of_a_method_works(tmp_path, monkeypatch):
    code, line = fenced(section(CONTRIBUTING, "Add a method"), "python")[:2]
    (tmp_path / "largest_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert line.strip().startswith("METHODS[")
    monkeypatch.setitem(methods.METHODS, "largest", "largest_example")
    described = methods.describe("largest")
    assert described.summary == "Keep the largest change of any expert."
    assert described.parameters["scale"].summary == "factor of the merged change"
    merged = described.load()(
        TensorDeltas(torch.zeros(2), [torch.tensor([1.0, -3.0]), torch.tensor([-2.0, 1.0])]), scale=2.0
    )
    assert merged.tolist() == [-4.0, -6.0]
    assert "largest" in CliRunner().invoke(cli, ["methods", "largest"]).output


@pytest.mark.parametrize(("title", "fewest"), [("Tried", 30), ("Faults", 20)])
def test_the_tests_that_the_security_tables_name_exist(title, fewest):
    rows = re.findall(r"^\| (?!input |fault |---)(.+?) \| (.+) \| (.+?) \|$", section(SECURITY, title), re.MULTILINE)
    assert len(rows) > fewest
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    for row in rows:
        named = re.findall(r"`(\w+)`", row[2])
        assert named, row
        assert set(named) <= there, row


@pytest.mark.parametrize("text", [README, CONTRIBUTING, SECURITY], ids=["README", "CONTRIBUTING", "SECURITY"])
def test_files_that_the_documents_link_to_exist(text):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_the_changelog_and_the_package_agree_on_the_version():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{streammerge.__version__}"' in project
