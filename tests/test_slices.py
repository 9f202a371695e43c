"""mergekit's `slices`: what means whole models is read, all else is refused."""

from __future__ import annotations

import pytest

from streammerge.errors import RecipeError
from streammerge.recipe import Recipe

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
WHOLE = "List the models under `models`; one slice over all layers of each means the same."
ALL = "Give each source all of its layers: `[0, N]` with N the layers of the model."
APART = "takes models apart in mergekit; streammerge merges whole models"


def as_models(recipe: Recipe) -> dict[str, object]:
    """The recipe's normal form with `models` instead of its slice."""
    plain = recipe.to_dict()
    (part,) = plain.pop("slices")  # type: ignore[misc]
    models = [{key: value for key, value in each.items() if key != "layer_range"} for each in part["sources"]]
    return plain | {"models": models}


def refused(text: str) -> tuple[str, str | None]:
    with pytest.raises(RecipeError) as raised:
        Recipe.from_yaml(text)
    return raised.value.message, raised.value.hint


def test_the_slerp_recipe_of_model_cards_is_read_as_one_of_models() -> None:
    recipe = Recipe.from_yaml(SLERP)
    assert [expert.location for expert in recipe.experts] == ["org/b"]
    assert (recipe.base, recipe.layers, recipe.warnings) == ("org/a", 32, ())
    models = Recipe.from_dict(as_models(recipe))
    assert (models.experts, models.parameters, models.layers) == (recipe.experts, recipe.parameters, None)


def test_a_source_has_what_a_model_has() -> None:
    recipe = Recipe.from_yaml(LINEAR)
    assert [expert.location for expert in recipe.experts] == ["org/a", "org/b@main"]
    assert [dict(expert.parameters) != {} for expert in recipe.experts] == [True, False]


def test_a_base_outside_of_the_slice_is_not_warned_of_as_mergekit_does_not_add_it() -> None:
    recipe = Recipe.from_yaml(LINEAR + "base_model: org/base\nparameters: {weight: 1}\n")
    assert recipe.warnings == ()
    assert Recipe.from_dict(as_models(recipe)).warnings


@pytest.mark.parametrize("text", [SLERP, LINEAR])
def test_the_normal_form_keeps_the_slice_and_loads_to_an_equal_recipe(text: str) -> None:
    recipe = Recipe.from_yaml(text)
    again = Recipe.from_dict(recipe.to_dict())
    assert again == recipe == Recipe.from_yaml(again.text)
    assert again.to_dict() == recipe.to_dict()
    assert Recipe.from_yaml(text.replace(", 32]", ", 33]").replace("8]", "9]").replace("8.0]", "9]")) != recipe


@pytest.mark.parametrize(
    ("slices", "message", "hint"),
    [
        (
            "[{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [2, 4]}]}]",
            f"`slices` {APART}",
            WHOLE,
        ),
        ("[]", f"`slices` {APART}", WHOLE),
        ("[{sources: [{model: a, layer_range: [1, 4]}]}]", f"`layer_range` {APART}", ALL),
        (
            "[{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 5]}]}]",
            f"`layer_range` {APART}",
            ALL,
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
            "Known here: `model` and `parameters`.",
        ),
        ("[{sources: [], residual_weight: 1}]", "unknown key `residual_weight`", "Known here: `sources`."),
        (
            "[{sources: [], parameters: {weight: 1}}]",
            "`parameters` is set for one slice, which is the whole merge",
            "Move it to the top of the recipe.",
        ),
        (
            "[{sources: [], base_model: a}]",
            "`base_model` is set for one slice, which is the whole merge",
            "Move it to the top of the recipe.",
        ),
    ],
)
def test_any_other_slice_is_refused_with_its_line(slices: str, message: str, hint: str | None) -> None:
    assert refused(f"merge_method: linear\nslices: {slices}\n") == (f"recipe.yaml:2: {message}", hint)


@pytest.mark.parametrize("written", ["[0]", "[0, 4, 8]", "[0, 0]", "[-1, 4]", "[0, 1e30]", "[4, 2]"])
def test_a_range_is_from_0_to_a_number_of_layers(written: str) -> None:
    message, _ = refused(LINEAR.replace("[0, 8]", written))
    assert message.startswith("recipe.yaml:5: `layer_range")


@pytest.mark.parametrize("written", ["4", "[0, x]", "[0, true]", "[0, 2.5]", ""])
def test_a_range_is_two_whole_numbers(written: str) -> None:
    message, _ = refused(LINEAR.replace("[0, 8]", written))
    assert message.startswith("recipe.yaml:5: `layer_range")


def test_slices_beside_models_are_refused() -> None:
    found = refused(LINEAR + "models: [{model: org/a}]\n")
    assert found == ("recipe.yaml:2: `slices` and `models` say the same thing twice", "Keep one.")
