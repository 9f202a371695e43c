"""The demo's parts that need no model: the split, the cache, the table. `make demo` runs the rest."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import cache
import measure
import recipes
import texts
from models import Training

import demo
from streammerge import methods
from streammerge.recipe import Recipe


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def library() -> list[texts.Document]:
    return [
        texts.Document(group=f"book {number // 3}", text=f"chapter {number}\n" + f"line {number}\n" * 50)
        for number in range(120)
    ]


def test_no_group_is_on_both_sides_of_the_split() -> None:
    training, held_out = texts.split(library())
    assert len(training) + len(held_out) == 120
    assert {document.group for document in training}.isdisjoint(document.group for document in held_out)
    assert len(training) > len(held_out) > 0


def test_the_split_depends_on_names_alone() -> None:
    training, held_out = texts.split(library())
    again = texts.split(library()[::-1])
    assert (training[::-1], held_out[::-1]) == again


def test_windows_are_the_same_for_the_same_seed_only() -> None:
    drawn = [texts.draw_windows(library(), Letters(), count=7, length=33, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(window) for window in drawn[0]] == [33] * 7


def test_a_window_starts_at_the_start_of_a_line() -> None:
    for window in texts.draw_windows(library(), Letters(), count=20, length=20, seed=0):
        assert "".join(map(chr, window)).startswith(("chapter ", "line "))


def test_texts_too_short_for_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="0 windows of 2"):
        texts.draw_windows([texts.Document(group="a", text="short")], Letters(), count=2, length=99, seed=0)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(texts.MissingPackageError, match="`no-such-text` is not installed"):
        texts.package_folder("no_such_text", "no-such-text")


@pytest.mark.parametrize(
    "change", [{"steps": 41}, {"learning_rate": 1e-4}, {"seed": 2}, {"window_tokens": 128}], ids=str
)
def test_a_changed_setting_changes_the_key(change: dict[str, Any]) -> None:
    settings = asdict(Training())
    assert cache.key_of(settings) == cache.key_of(asdict(Training()))
    assert cache.key_of(settings) != cache.key_of({**settings, **change})


def save(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def interrupted(folder: Path) -> None:
    save(folder)
    raise KeyboardInterrupt


def never(folder: Path) -> None:
    raise AssertionError(f"{folder} was made again")


def test_a_finished_expert_is_found_again(tmp_path: Path) -> None:
    first, made = cache.cached_model(tmp_path, "expert", {"steps": 1}, save)
    assert made
    assert cache.cached_model(tmp_path, "expert", {"steps": 1}, never) == (first, False)
    assert cache.cached_model(tmp_path, "expert", {"steps": 2}, save)[1]


def test_an_interrupted_expert_is_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache.cached_model(tmp_path, "expert", {"steps": 1}, interrupted)
    expert, made = cache.cached_model(tmp_path, "expert", {"steps": 1}, save)
    assert made
    assert [path.name for path in tmp_path.iterdir()] == [expert.parent.name]


@pytest.mark.parametrize("damage", ["complete.json", "model/config.json"])
def test_an_expert_without_all_its_files_is_made_again(tmp_path: Path, damage: str) -> None:
    expert, _ = cache.cached_model(tmp_path, "expert", {"steps": 1}, save)
    (expert.parent / damage).unlink()
    assert cache.cached_model(tmp_path, "expert", {"steps": 1}, save) == (expert, True)


def test_an_expert_recorded_under_other_settings_is_made_again(tmp_path: Path) -> None:
    expert, _ = cache.cached_model(tmp_path, "expert", {"steps": 1}, save)
    (expert.parent / "complete.json").write_text(json.dumps({"steps": 9}))
    assert cache.cached_model(tmp_path, "expert", {"steps": 1}, save)[1]


def test_only_what_a_merge_made_is_cleared(tmp_path: Path) -> None:
    for name, content in (("mine", "notes.txt"), ("merged", "streammerge.json"), ("new.partial", "journal.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("")
    for name in ("mine", "merged", "new"):
        demo.clear(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


BASE = {"code": 3.0, "verse": 5.0}
EXPERTS = {"code": {"code": 2.0, "verse": 5.5}, "verse": {"code": 3.1, "verse": 3.0}}


def test_gain_kept_is_0_for_the_base_and_1_for_what_matches_every_expert() -> None:
    assert measure.gain_kept(BASE, BASE, EXPERTS) == 0
    assert measure.gain_kept({"code": 2.0, "verse": 3.0}, BASE, EXPERTS) == 1
    assert measure.gain_kept({"code": 2.5, "verse": 5.0}, BASE, EXPERTS) == pytest.approx(0.25)


def test_an_expert_that_gained_nothing_is_left_out() -> None:
    experts = {**EXPERTS, "code": {"code": 3.2, "verse": 5.0}}
    assert measure.gain_kept({"code": 9.0, "verse": 4.0}, BASE, experts) == 0.5
    assert measure.format_table({"base": BASE}, {"base": float("nan")}).endswith("none")


def test_the_table_has_a_row_for_each_model_and_a_column_for_each_domain() -> None:
    rows = {"base": BASE, "expert code": EXPERTS["code"]}
    assert measure.format_table(rows, {"base": 0.0, "expert code": 0.375}).splitlines() == [
        "nats per token   code  verse   mean  gain kept",
        "base            3.000  5.000  4.000         0%",
        "expert code     2.000  5.500  3.750        38%",
    ]


@pytest.mark.parametrize("name", recipes.names("all"))
def test_every_method_has_a_recipe_that_is_valid(name: str) -> None:
    method = recipes.method_of(name)
    experts = [Path(letter) for letter in "xyz"]
    data = [Path("data")] * 3 if method.beside else []
    recipe = Recipe.from_dict(recipes.recipe(name, Path("base"), experts, data))
    assert recipe.method == method.name
    assert len(recipe.experts) == {**dict.fromkeys(recipes.ONE_EXPERT, 1), "nuslerp": 2}.get(name, 3)
    assert all((expert.beside is not None) == (method.beside is not None) for expert in recipe.experts)


def test_all_means_every_method_and_what_there_is_not_is_refused() -> None:
    assert {recipes.method_of(name).name for name in recipes.names("all")} == set(methods.names())
    assert recipes.names("actmat, ties") == ["actmat", "ties"]
    for wrong in ("actmatt", "", "actmat,linear"):
        with pytest.raises(SystemExit, match=r"error: no method .*\n\nhint: Take of: all, average"):
            recipes.names(wrong)
