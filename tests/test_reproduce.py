"""A report is a recipe: merging from it does the same merge again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import streammerge
from streammerge.errors import RecipeError
from streammerge.recipe import Recipe
from tests.models import recipe_of
from tests.stored import digests
from tests.test_verification import change

RICH: dict[str, object] = {
    "rounding": "stochastic",
    "seed": 7,
    "chat_template": "{{ x }}",
    "rules": [{"match": "lm_head", "keep": "base"}, {"match": "norm", "merge_method": "linear"}],
    "parameters": {"density": 0.5},
}


@pytest.fixture
def out(family: dict[str, Path], tmp_path: Path) -> Path:
    streammerge.merge(recipe_of(family, "dare_linear", **RICH), tmp_path / "out", max_shard_size="6KB")
    return tmp_path / "out"


def test_a_merge_from_a_report_gives_the_same_files(out, tmp_path):
    report = streammerge.merge(out / "streammerge.json", tmp_path / "again")
    assert digests(out) == digests(tmp_path / "again")
    assert len(list(out.glob("*.safetensors"))) == 3
    # and that one's report gives them once more
    streammerge.merge(tmp_path / "again" / "streammerge.json", tmp_path / "more")
    assert digests(out) == digests(tmp_path / "more")
    before = json.loads((out / "streammerge.json").read_text())
    after = report.to_dict()
    for key in ("recipe", "inputs", "max_shard_bytes", "device"):
        assert json.loads(json.dumps(after[key])) == before[key], key


def test_another_shard_size_that_is_asked_for_is_had(out, tmp_path):
    assert len(streammerge.plan(out / "streammerge.json").layout.shards) == 3
    assert len(streammerge.plan(out / "streammerge.json", max_shard_size="1MB").layout.shards) == 1


def test_the_recipe_of_a_report_is_the_one_that_was_merged(out, family):
    assert Recipe.load(out / "streammerge.json") == Recipe.load(recipe_of(family, "dare_linear", **RICH))


def test_relative_inputs_are_found_from_where_they_were_merged(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"merge_method": "linear", "models": [{"model": "math"}, {"model": "code"}]}
    streammerge.merge(recipe, "out")
    streammerge.merge("out/streammerge.json", "again")
    assert digests(tmp_path / "out") == digests(tmp_path / "again")
    assert streammerge.verify("out", inputs=True).problems == ()


def test_inputs_that_changed_since_are_warned_of(out, family, tmp_path):
    assert streammerge.plan(out / "streammerge.json").warnings == ()
    change(family["math"], "lm_head.weight", 0, b"\x00")
    # values are not in a fingerprint
    assert streammerge.plan(out / "streammerge.json").warnings == ()
    for file in family["math"].glob("*00001*.safetensors"):
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        file.write_bytes((size + 8).to_bytes(8, "little") + content[8 : 8 + size] + b" " * 8 + content[8 + size :])
    (warning,) = streammerge.plan(out / "streammerge.json").warnings
    assert warning.startswith(
        "the inputs are not those of the report, so the output will differ: `model-00001-of-00002"
    )


def test_a_report_holds_what_tells_its_inputs_apart(out, family):
    table = json.loads((out / "streammerge.json").read_text())
    assert [each["location"] for each in table["inputs"]] == [str(folder) for folder in family.values()]
    for each in table["inputs"]:
        for file, facts in each["files"].items():
            found = (Path(each["location"]) / file).stat()
            assert (facts["size"], facts["modified_ns"]) == (found.st_size, found.st_mtime_ns)
            assert len(facts["header_sha256"]) == 64
    assert table["max_shard_bytes"] == 6000
    assert table["device"] == "cpu"


def test_a_recipe_written_as_json_is_still_a_recipe(family, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_of(family, "linear")))
    assert Recipe.load(path).past is None
    path.write_text("{")
    with pytest.raises(RecipeError, match=r"recipe\.json"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="does not exist"):
        Recipe.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "damage",
    [
        {"recipe": 3}, {"recipe": {}}, {"recipe": {"merge_method": "linear", "models": [{"modle": "a"}]}},
        {"max_shard_bytes": "5GB"}, {"max_shard_bytes": -1}, {"max_shard_bytes": True}, {"inputs": 3}, {"inputs": []},
        {"inputs": [3, 3, 3, 3]}, {"inputs": [{"files": 3}] * 4}, {"inputs": [{"files": {"a": 3}}] * 4},
    ],
)  # fmt: skip
def test_a_damaged_report_is_refused_as_a_recipe(out, damage):
    path = out / "streammerge.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(RecipeError, match=r"streammerge\.json"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match=r"streammerge\.json"):
        streammerge.verify(out, inputs=True)


def test_a_report_with_odd_facts_of_its_inputs_is_a_difference(out):
    path = out / "streammerge.json"
    table = json.loads(path.read_text())
    for each in table["inputs"]:
        each["files"] = {file: {"size": "x"} for file in each["files"]}
    path.write_text(json.dumps(table))
    assert len(streammerge.verify(out, inputs=True).problems) == 9
