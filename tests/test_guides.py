"""The guides under docs/ do what they say: their files are written, their commands and Python run, in order."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from streammerge.batching import read_night
from streammerge.cli import cli
from streammerge.recipe import Recipe
from tests.models import llama_tensors, save_model, tuned

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("one-gpu", "overnight", "evaluation", "from-mergekit")]
SCORE = "import json, os, sys; print(json.dumps({'accuracy': len(os.path.basename(sys.argv[1])) / 100}))\n"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and the program that the guides speak of."""
    base = llama_tensors()
    for seed, name in enumerate(("llama", "llama-math", "llama-code", "llama-chat")):
        save_model(tmp_path / "models" / name, tuned(base, seed) if seed else base)
    (tmp_path / "score.py").write_text(SCORE)
    # the interpreter that the guides call `python`
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if "streammerge " in line and "-m " not in line]


def run(words: list[str]) -> None:
    assert words[0] == "streammerge"
    if words[1] == "merge" and "--device" in words:
        # a plan needs no GPU, a merge does: what it does is tried where there is one
        place = words.index("--device")
        words = words[:place] + words[place + 2 :]
    done = CliRunner().invoke(cli, words[1:])
    assert done.exit_code == 0, (words, done.output, done.exception)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_a_guide_does_what_it_says(desk, path):
    ran = 0
    for language, text in BLOCK.findall(path.read_text()):
        if language == "yaml":
            name = text.partition("\n")[0].removeprefix("# ")
            assert name in ("recipe.yaml", "night.yaml"), name
            Path(name).write_text(text)
        elif language == "console":
            for words in commands(text):
                run(words)
                ran += 1
        elif language == "python":
            exec(compile(text, str(path), "exec"), {"__name__": "guide"})
            ran += 1
    assert ran >= 3


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_a_guides_files_are_sound_and_its_commands_have_these_options(desk, path):
    for language, text in BLOCK.findall(path.read_text()):
        if language == "yaml" and "jobs:" in text:
            Path("recipe.yaml").write_text("merge_method: actmat\nbase_model: a\nmodels: [{model: b}]\n")
            Path("night.yaml").write_text(text)
            assert read_night("night.yaml").jobs
        elif language == "yaml":
            Recipe.from_dict(yaml.safe_load(text))
        elif language in ("console", "sh"):
            for words in commands(text):
                known = {option for parameter in cli.commands[words[1]].params for option in parameter.opts}
                assert {word for word in words[2:] if word.startswith("-")} <= known, words


def test_what_a_guide_calls_an_option_is_one():
    every = {option for command in cli.commands.values() for each in command.params for option in each.opts}
    for path in GUIDES:
        # of a table, the last column is ours
        text = "\n".join(line.rpartition(" | ")[2] for line in path.read_text().splitlines())
        assert set(re.findall(r"`(--[a-z-]+)`", text)) <= every, path


def test_every_guide_is_linked_from_the_readme_and_links_to_what_is_there():
    readme = (ROOT / "README.md").read_text()
    for path in GUIDES:
        assert f"(docs/{path.name})" in readme
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), target


def test_verbs_in_guides_exist():
    for path in GUIDES:
        for verb in re.findall(r"`streammerge ([a-z]+)", path.read_text()):
            assert isinstance(cli.commands[verb], click.Command)
