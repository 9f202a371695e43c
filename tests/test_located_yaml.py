from __future__ import annotations

from contextlib import suppress

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.errors import RecipeError
from streammerge.located_yaml import Located, did_you_mean, nearest, parse, wrap


def plain(located: Located) -> object:
    if isinstance(located.value, dict):
        return {key: plain(value) for key, value in located.value.items()}
    if isinstance(located.value, list):
        return [plain(item) for item in located.value]
    return located.value


def refused(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as raised:
        parse(text, "recipe.yaml")
    return raised.value


def test_every_value_knows_its_line() -> None:
    fields = parse("a: 1\n\nb:\n  - x\n  - c: 2\n", "recipe.yaml").mapping()
    assert fields["a"].where == "recipe.yaml:1"
    assert [item.where for item in fields["b"].items()] == ["recipe.yaml:4", "recipe.yaml:5"]
    assert fields["b"].items()[1].mapping()["c"].where == "recipe.yaml:5"


def test_a_python_mapping_knows_its_path() -> None:
    fields = wrap({"models": [{"model": "a"}]}, "recipe").mapping()
    assert fields["models"].items()[0].mapping()["model"].where == "recipe.models[0].model"


SCALARS = "a: 1\nb: 1.5\nc: yes\nd: ~\ne: 0x10\nf: 2024-01-01\ng: text\nh: '1'\nj:\nk: [1, {}]\n"


def test_scalars_mean_what_yaml_says_and_dates_stay_text() -> None:
    expected = yaml.safe_load(SCALARS) | {"f": "2024-01-01"}
    assert plain(parse(SCALARS, "recipe.yaml")) == expected


def test_anchors_and_merge_keys_mean_what_pyyaml_makes_of_them() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [{y: 4}, *a]}\nd: *a\n"
    assert plain(parse(text, "recipe.yaml")) == yaml.safe_load(text)


def test_a_key_given_twice_names_both_lines() -> None:
    error = refused("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n")
    assert error.message == "recipe.yaml:5: `c` appears twice, first on line 3"
    assert error.hint == "Keep one of them."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: c: d\n", "recipe.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: [1,\n", "recipe.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"),
        ("a: *b\n", "recipe.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("a: 1\n---\nb: 1\n", "recipe.yaml:2: a second document starts here, expected one recipe"),
        ("a: 1\nb: \x07\n", "recipe.yaml:2: the character U+0007 is not allowed in YAML"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', "recipe.yaml:2: not valid YAML: a number is out of range"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "recipe.yaml:1: not valid YAML: a number is out of range"),
        ("a: !!int ''\n", "recipe.yaml:1: `` is not a valid int"),
        ("[a]: 1\n", "recipe.yaml:1: a key is a list or a mapping, expected text"),
        ("<<: 1\n", "recipe.yaml:1: `<<` is `1`, expected a mapping"),
        ("x: '" + "a" * (1 << 20) + "'", "`recipe.yaml` is larger than 1 MiB, which no recipe is"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    assert refused(text).message == message


@pytest.mark.parametrize("text", ["", "\n\n", "# a comment\n", "~"])
def test_an_empty_recipe_says_how_to_start(text: str) -> None:
    if text == "~":
        assert parse(text, "recipe.yaml").value is None
        return
    error = refused(text)
    assert error.message == "recipe.yaml:1: the recipe is empty"
    assert error.hint == "A recipe starts with `merge_method` and `models`."


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [ls]", "!!binary aGk=", "!!set {a}", "!own x"])
def test_a_tag_that_builds_an_object_is_refused(tag: str) -> None:
    error = refused(f"a: 1\nb: {tag}\n")
    name = tag.split()[0]
    assert error.message == f"recipe.yaml:2: the tag `{name}` is not allowed"
    assert error.hint == "Write plain text, numbers, lists and mappings."


def bomb() -> str:
    lines = ["a: &a [" + ",".join("x" * 10) + "]"]
    for before, letter in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{letter}: &{letter} [{','.join([f'*{before}'] * 10)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(bomb(), id="alias bomb"),
        pytest.param("a: &a [*a]", id="list in itself"),
        pytest.param("a: &a {b: *a}", id="mapping in itself"),
        pytest.param("a: &a {<<: *a}", id="merge of itself"),
        pytest.param("[" * 500_000, id="deep brackets"),
        pytest.param("- " * 500_000, id="deep dashes"),
        pytest.param("? " * 500_000, id="deep keys"),
        pytest.param("[" + "1," * 120_000 + "]", id="long list"),
    ],
)
def test_a_bomb_is_refused_before_it_grows(text: str) -> None:
    assert "more than 32 levels or 100000 values, which no recipe has" in refused(text).message


@pytest.mark.parametrize("number", ["1" + ":1" * 100_000, "9" * 5000])
def test_a_number_too_long_to_read_is_refused(number: str) -> None:
    assert "is not a valid int" in refused(f"a: {number}").message


def test_a_mapping_that_holds_itself_is_refused() -> None:
    data: dict[str, object] = {}
    data["a"] = data
    with pytest.raises(RecipeError, match="recipe: more than 32 levels"):
        wrap(data, "recipe")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": {1: 2}}, "recipe.a: the key `1` is not text"),
        ({"a": object()}, "recipe.a: `a` is of type object, expected text, numbers, lists or mappings"),
        ({"a": [{2}]}, "recipe.a[0]: `a[0]` is of type set, expected text, numbers, lists or mappings"),
    ],
)
def test_a_python_value_that_yaml_has_not_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        wrap(data, "recipe")
    assert raised.value.message == message


@pytest.mark.parametrize("text", ["1e-5", "1E5", "-.5e+3", "3", "0.25", "1_000.5"])
def test_a_number_may_be_written_as_other_yaml_readers_allow(text: str) -> None:
    assert parse(f"a: {text}", "recipe.yaml").mapping()["a"].number() == float(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yes", "`a` is `true`, expected a number"),
        ("high", "`a` is the text `high`, expected a number"),
        (".nan", "`a` is `nan`, expected a finite number"),
        ("-.inf", "`a` is `-inf`, expected a finite number"),
        ("1e999", "`a` is the text `1e999`, expected a finite number"),
        ("0x" + "f" * 390, "`a` is a number of more than 128 bits, expected a finite number"),
        ("", "`a` is empty, expected a number"),
        ("[1]", "`a` is a list, expected a number"),
        ('"\\e[2J"', "`a` is the text `\\x1b[2J`, expected a number"),
    ],
)
def test_what_is_not_a_number_is_described(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse(f"a: {text}", "recipe.yaml").mapping()["a"].number()
    assert raised.value.message == f"recipe.yaml:1: {message}"


def test_the_nearest_option_is_suggested_or_all_are_listed() -> None:
    assert nearest("densty", ["density", "weight"]) == "Did you mean `density`?"
    assert nearest("speed", ["density", "weight"]) is None
    assert did_you_mean("speed", ["density", "weight"]) == "Known here: `density` and `weight`."


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab1:-?[]{},&*!|>'\"%@`#~<=.\n\t \\xuU\x00é"), max_size=60))
def test_no_text_makes_anything_but_a_recipe_error(text: str) -> None:
    with suppress(RecipeError):
        parse(text, "recipe.yaml")


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), yaml_values, max_size=4))
def test_what_pyyaml_writes_is_read_back(data: dict[str, object]) -> None:
    if not data:
        return
    written = yaml.safe_dump(data)
    assert plain(parse(written, "recipe.yaml")) == data == plain(wrap(data, "recipe"))
