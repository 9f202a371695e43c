"""mergekit's `slices`: how they are read, and what is refused with its line."""

from __future__ import annotations

import pytest

from streammerge.errors import RecipeError
from streammerge.recipe import Recipe
from streammerge.slices import Slice, Source

SLERP = """\
slices:
  - sources:
      - model: org/a
        layer_range: [0, 32]
      - model: org/b
        layer_range: [0, 32]
merge_method: slerp
base_model: org/a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - value: 0.5
dtype: bfloat16
"""
LINEAR = """\
merge_method: linear
slices:
- sources:
  - model: org/a
    layer_range: [0, 8]
    parameters: {weight: [0, 1]}
  - {model: {model: {path: org/b, revision: main}}, layer_range: [0, 8.0]}
"""
STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 12], parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}}]
  - sources: [{model: b, layer_range: [8, 20]}]
  - sources: [{model: a, layer_range: [16, 24]}]
"""


def refused(text: str) -> tuple[str, str | None]:
    with pytest.raises(RecipeError) as raised:
        Recipe.from_yaml(text)
    return raised.value.message, raised.value.hint


def test_the_slerp_recipe_of_model_cards_is_read() -> None:
    recipe = Recipe.from_yaml(SLERP)
    assert [expert.location for expert in recipe.experts] == ["org/b"]
    assert (recipe.base, recipe.warnings) == ("org/a", ())
    assert recipe.slices == (Slice(layers=32, sources=(Source(expert=0, first=0),), base_first=0),)


def test_a_source_has_what_a_model_has() -> None:
    recipe = Recipe.from_yaml(LINEAR)
    assert [expert.location for expert in recipe.experts] == ["org/a", "org/b@main"]
    assert [dict(source.parameters) != {} for source in recipe.slices[0].sources] == [True, False]


def test_a_model_that_several_slices_name_is_read_once() -> None:
    recipe = Recipe.from_yaml(STACK)
    assert [expert.location for expert in recipe.experts] == ["a", "b"]
    assert [[(source.expert, source.first) for source in part.sources] for part in recipe.slices] == [
        [(0, 0)],
        [(1, 8)],
        [(0, 16)],
    ]
    assert recipe.locations == ("a", "b")


def test_the_base_goes_with_the_layers_that_it_is_listed_with_or_that_all_others_have() -> None:
    recipe = Recipe.from_yaml(
        "merge_method: ties\nbase_model: base\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}, {model: base, layer_range: [4, 6]}]\n"
        "- sources: [{model: a, layer_range: [3, 5]}, {model: b, layer_range: [3, 5]}]\n"
        "- sources: [{model: base, layer_range: [7, 8]}, {model: b, layer_range: [7, 8]}]\n"
        "  base_model: a\n".replace("model: base, layer_range: [7", "model: a, layer_range: [7")
    )
    assert [part.base_first for part in recipe.slices] == [4, 3, 7]
    assert [part.base for part in recipe.slices] == [None, None, "a"]


def test_a_base_that_the_method_does_not_work_with_is_a_source_like_any_other() -> None:
    recipe = Recipe.from_yaml(LINEAR.replace("model: org/a", "model: base") + "base_model: base\n")
    assert recipe.locations == ("base", "base", "org/b@main")
    assert recipe.warnings == ()


@pytest.mark.parametrize(
    "text",
    [
        SLERP,
        LINEAR,
        STACK,
        "merge_method: ties\nbase_model: c\nslices:\n- base_model: a\n  parameters: {density: [0.1, 1]}\n  sources:\n"
        "  - {model: b, layer_range: [0, 2], parameters: {weight: 2}}\n  - {model: a, layer_range: [1, 3]}\n"
        "- sources: [{model: c, layer_range: [5, 6]}, {model: b, layer_range: [0, 1]}]\n",
        "merge_method: regmean\nbase_model: c\nslices:\n- sources:\n"
        "  - {model: b, covariance: x, layer_range: [0, 2]}\n  - {model: b, covariance: y, layer_range: [0, 2]}\n",
    ],
)
def test_the_normal_form_keeps_the_slices_and_loads_to_an_equal_recipe(text: str) -> None:
    recipe = Recipe.from_yaml(text)
    again = Recipe.from_dict(recipe.to_dict())
    assert again == recipe == Recipe.from_yaml(again.text)
    assert again.to_dict() == recipe.to_dict()


def test_another_range_is_another_recipe() -> None:
    assert Recipe.from_yaml(STACK.replace("[0, 12]", "[0, 11]")) != Recipe.from_yaml(STACK)


@pytest.mark.parametrize(
    ("slices", "message", "hint"),
    [
        ("[]", "`slices` lists no slice", "List at least one, with its `sources`."),
        (
            "[{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 5]}]}]",
            "`layer_range` takes 5 layers, the slice's first source 4",
            "The sources of a slice are merged layer by layer: give each as many.",
        ),
        ("[{sources: [{model: a}]}]", "`layer_range` is missing", None),
        ("[{sources: [{layer_range: [0, 4]}]}]", "`model` is missing", None),
        ("[{sources: []}]", "`sources` lists no model", "List at least one model to merge."),
        ("[{}]", "`sources` is missing", None),
        ("{}", "`slices` is a mapping, expected a list of slices", None),
        ("[{sources: a}]", "`sources` is the text `a`, expected a list of models", None),
        (
            "[{sources: [a]}]",
            "`sources[0]` is the text `a`, expected a mapping with `model` and `layer_range`",
            None,
        ),
        (
            "[{sources: [{model: a, layer_range: [0, 4], weight: 1}]}]",
            "unknown key `weight`",
            "Known here: `model`, `lora`, `parameters` and `key_map`.",
        ),
        (
            "[{sources: [], residual_weight: 1}]",
            "unknown key `residual_weight`",
            "Known here: `sources`, `base_model` and `parameters`.",
        ),
        (
            "[{sources: [{model: a, layer_range: [0, 4]}], parameters: {density: 1}}]",
            "unknown parameter `density` for method `linear`",
            "`streammerge methods linear` lists its parameters.",
        ),
        (
            "[{sources: [{model: a, layer_range: [0, 99999]}]}, {sources: [{model: a, layer_range: [0, 2]}]}]",
            "`slices` stack 100001 layers, over the limit of 100000",
            None,
        ),
    ],
)
def test_a_slice_that_is_none_is_refused_with_its_line(slices: str, message: str, hint: str | None) -> None:
    assert refused(f"merge_method: linear\nslices: {slices}\n") == (f"recipe.yaml:2: {message}", hint)


@pytest.mark.parametrize(
    ("sources", "message", "hint"),
    [
        (
            "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]",
            "`sources` does not say which layers of the base `base` the others' go with",
            "List the base too, with a `layer_range` as long as theirs.",
        ),
        (
            "[{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}, {model: base, layer_range: [1, 3]}]",
            "`sources` lists the base twice",
            "Keep one: its layers are what changes count from.",
        ),
        (
            "[{model: base, layer_range: [0, 2]}]",
            "`sources` lists only the base model",
            "List at least one model to merge.",
        ),
    ],
)
def test_a_base_whose_layers_are_not_known_is_refused(sources: str, message: str, hint: str) -> None:
    text = f"merge_method: ties\nbase_model: base\nslices:\n- sources: {sources}\n"
    assert refused(text) == (f"recipe.yaml:4: {message}", hint)


def test_a_method_of_changes_needs_a_base_for_each_slice() -> None:
    text = "merge_method: ties\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n  base_model: b\n"
    assert Recipe.from_yaml(text).locations == ("a", "b")
    found = refused(text + "- sources: [{model: a, layer_range: [0, 2]}]\n")
    assert found[0] == "recipe.yaml:5: method `ties` needs a base model"


def test_a_rule_that_needs_a_base_needs_its_layers_too() -> None:
    rule = "rules:\n- {match: mlp, %s}\nbase_model: c\n"
    for said in ("merge_method: ties", "keep: base"):
        text = LINEAR.replace("[0, 8]", "[1, 9]") + rule % said
        assert refused(text) == (
            "recipe.yaml:9: no layers of the base go with those of `slices[0]`",
            "List the base as a source of the slice, with a `layer_range` as long.",
        )
        assert Recipe.from_yaml(LINEAR + rule % said).rules


@pytest.mark.parametrize("written", ["[0]", "[0, 4, 8]", "[-1, 4]", "4", "[0, x]", "[0, true]", "[0, 2.5]", ""])
def test_a_range_is_two_whole_numbers(written: str) -> None:
    message, _ = refused(LINEAR.replace("[0, 8]", written))
    assert message.startswith("recipe.yaml:5: `layer_range")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("[0, 0]", "`layer_range: [0, 0]` holds no layer"),
        ("[4, 2]", "`layer_range: [4, 2]` holds no layer"),
        ("[0, 100001]", "`layer_range` goes beyond the 100000 layers that a model may have"),
    ],
)
def test_a_range_that_no_model_has_is_refused(written: str, found: str) -> None:
    message, _ = refused(LINEAR.replace("[0, 8]", written))
    assert message == f"recipe.yaml:5: {found}"


def test_slices_beside_models_are_refused() -> None:
    found = refused(LINEAR + "models: [{model: org/a}]\n")
    assert found == ("recipe.yaml:2: `slices` and `models` say the same thing twice", "Keep one.")
