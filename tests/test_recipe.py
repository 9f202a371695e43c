from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge import methods
from streammerge.errors import RecipeError
from streammerge.recipe import Recipe, Setting

LINEAR = """\
models:
  - model: org/a
  - model: org/b
merge_method: linear
"""
TASK = """\
merge_method: task_arithmetic
base_model: org/base
models:
  - model: org/a
  - model: org/b
"""


def refused(source: str | Mapping[str, object]) -> RecipeError:
    with pytest.raises(RecipeError) as raised:
        Recipe.from_yaml(source) if isinstance(source, str) else Recipe.from_dict(source)
    return raised.value


def resolved(recipe: Recipe, tensor: str = "w", position: float = 0.0, **rule: Any) -> dict[str, object]:
    return recipe.resolve(methods.describe(recipe.method), tensor, position, **rule)


FAKE = '''
from __future__ import annotations

from typing import Literal

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method


@merge_method(needs_base=True, streams_by="element")
def trimmed(
    deltas: Deltas, *, weight: PerExpert = 1.0, density: PerExpert = 0.5, rank: int = 4,
    sign: Literal["sum", "count"] = "sum", rescale: bool = False, label: str = "x",
) -> object:
    """Trim.

    density  fraction kept
    """
'''


@pytest.fixture
def trimmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method with a parameter of every kind, in a file of its own."""
    (tmp_path / "fake_trimmed.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.METHODS, "trimmed", "fake_trimmed")


TRIMMED = """\
merge_method: trimmed
base_model: org/base
models:
  - model: org/a
    parameters: {density: 0.25}
  - model: org/b
"""


# Configs as people publish them, for the methods we have.


def test_mergekits_linear_example_runs_unchanged() -> None:
    recipe = Recipe.from_yaml("""\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""")
    assert recipe.base is None
    assert recipe.names == ("orca_mini_v3_13b", "WizardLM-13B-V1.2", "Platypus2-13B")
    assert resolved(recipe) == {"weight": (1.0, 0.3, 0.5), "normalize": True}
    assert recipe.output_dtype == "F16"


def test_a_task_arithmetic_config_with_revisions_runs_unchanged() -> None:
    recipe = Recipe.from_yaml("""\
models:
  - model: open-r1/R1-Distill-Qwen-Math-7B@v00.02-step-000003660
    parameters:
      weight: 0.5
  - model: open-r1/R1-Distill-Qwen-Math-7B@v01.02-step-000002600
    parameters:
      weight: 0.5
merge_method: task_arithmetic
parameters:
  lambda: 1.0
base_model: open-r1/Qwen2.5-Math-7B-RoPE-300k
dtype: bfloat16
chat_template: "auto"
""")
    assert resolved(recipe) == {"weight": (0.5, 0.5), "normalize": False, "lambda_": 1.0}
    assert recipe.output_dtype == "BF16"
    assert recipe.chat_template == "auto"


def test_a_config_that_lists_its_base_first_runs_unchanged() -> None:
    recipe = Recipe.from_yaml("""\
merge_method: task_arithmetic
base_model: TheBloke/Llama-2-13B-fp16
models:
  - model: TheBloke/Llama-2-13B-fp16
  - model: KoboldAI/LLaMA2-13B-Tiefighter
    parameters:
      weight: 1.0
  - model: chaoyi-wu/MedLLaMA_13B
    parameters:
      weight: 0.01
parameters:
  normalize: true
  int8_mask: true
dtype: float16
tokenizer_source: base
""")
    assert [expert.location for expert in recipe.experts] == [
        "KoboldAI/LLaMA2-13B-Tiefighter",
        "chaoyi-wu/MedLLaMA_13B",
    ]
    assert resolved(recipe) == {"weight": (1.0, 0.01), "normalize": True, "lambda_": 1.0}
    assert recipe.warnings == (
        "recipe.yaml:13: `int8_mask` is ignored: it saves memory in mergekit and changes no result",
    )


def test_a_linear_config_with_a_weight_for_all_and_numbers_for_truths_runs_unchanged() -> None:
    recipe = Recipe.from_yaml("""\
name: first-merge
merge_method: linear
base_model: org/step-10000
models:
  - model: org/step-9000
  - model: org/step-10000
parameters:
  weight: 0.5
  normalize: 0.0
dtype: float32
out_dtype: bfloat16
tokenizer:
  source: org/step-10000
""")
    assert resolved(recipe) == {"weight": (0.5, 0.5), "normalize": False}
    assert recipe.output_dtype == "BF16"
    assert recipe.tokenizer_source == "org/step-10000"
    assert recipe.name == "first-merge"
    assert recipe.names == ("step-10000", "step-9000", "step-10000 #2")
    assert recipe.warnings == ()


def test_a_config_with_gradients_and_filters_runs_unchanged() -> None:
    recipe = Recipe.from_yaml("""\
merge_method: task_arithmetic
base_model: org/base
models:
  - model: org/a
    parameters:
      weight:
        - filter: self_attn
          value: [0, 0.5, 1]
        - filter: mlp
          value: 0.25
        - value: 0.75
  - model: org/b
    parameters:
      weight: [1, 0]
""")
    assert resolved(recipe, "model.layers.0.self_attn.q_proj.weight", 0.25)["weight"] == (0.25, 0.75)
    assert resolved(recipe, "model.layers.0.mlp.up_proj.weight", 0.5)["weight"] == (0.25, 0.5)
    assert resolved(recipe, "lm_head.weight", 0.0)["weight"] == (0.75, 1.0)


def test_mergekits_long_form_of_a_model_is_read() -> None:
    recipe = Recipe.from_yaml("""\
merge_method: linear
models:
  - model: {model: {path: org/a, revision: main}, lora: null}
  - model:
      model: org/b
      override_architecture: LlamaForCausalLM
""")
    assert [expert.location for expert in recipe.experts] == ["org/a@main", "org/b"]
    assert recipe.warnings == (
        "recipe.yaml:6: `override_architecture` is ignored: tensors are matched by name, whatever the architecture",
    )


@pytest.mark.parametrize(
    "written",
    [
        "org/b+org/adapter",
        "{model: org/b, lora: org/adapter}",
        "{model: {path: org/b}, lora: {path: org/adapter}}",
        "org/b\n    lora: org/adapter",
    ],
)
def test_an_adapter_is_named_beside_its_model(written: str) -> None:
    recipe = Recipe.from_yaml(LINEAR.replace("org/b", written))
    assert [expert.location for expert in recipe.experts] == ["org/a", "org/b+org/adapter"]
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_both_sides_of_a_plus_may_lie_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("base", "adapter", "c+d"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\nmodels: [{model: base+adapter}, {model: c+d}]\n")
    recipe = Recipe.from_file(tmp_path / "recipe.yaml")
    assert [each.location for each in recipe.experts] == [f"{tmp_path}/base+{tmp_path}/adapter", f"{tmp_path}/c+d"]


@pytest.mark.parametrize(("method", "settings"), [("linear", "parameters: {weight: 1}\n"), ("karcher", "")])
def test_a_base_that_mergekit_would_average_in_is_mentioned(method: str, settings: str) -> None:
    recipe = Recipe.from_yaml(LINEAR.replace("linear", method) + "base_model: org/base\n" + settings)
    assert [expert.location for expert in recipe.experts] == ["org/a", "org/b"]
    assert recipe.warnings == (
        "recipe.yaml:5: `base_model` is ignored: "
        f"`{method}` merges what `models` lists, where mergekit would add the base",
    )


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_that_is_listed_needs_no_mention(method: str) -> None:
    recipe = Recipe.from_yaml(LINEAR.replace("linear", method) + "base_model: org/a\n")
    assert recipe.warnings == ()


@pytest.mark.parametrize("listed", ["", "- model: org/base\n"])
def test_a_method_that_takes_a_base_does_not_merge_it_listed_or_not(listed: str) -> None:
    text = LINEAR.replace("linear", "nuslerp").replace(
        "- model: org/b\n", "- model: org/b\n" + f"  {listed}" * bool(listed)
    )
    recipe = Recipe.from_yaml(text + "base_model: org/base\nparameters: {weight: 0.5}\n")
    assert [expert.location for expert in recipe.experts] == ["org/a", "org/b"]
    assert recipe.warnings == ()


def test_parameters_that_change_nothing_in_mergekit_are_ignored_with_a_warning() -> None:
    text = TASK.replace("org/b\n", "org/b\n    parameters: {density: 0.5, weight: 0.3}\n")
    recipe = Recipe.from_yaml(text + "parameters: {rescale: true}\n")
    assert resolved(recipe) == {"weight": (1.0, 0.3), "normalize": False, "lambda_": 1.0}
    reason = "`task_arithmetic` drops no entries, nor does mergekit's"
    assert recipe.warnings == (
        f"recipe.yaml:6: `density` is ignored: {reason}",
        f"recipe.yaml:7: `rescale` is ignored: {reason}",
    )
    assert refused(LINEAR + "parameters: {density: 0.5}\n").message.endswith("for method `linear`")


# Settings.


def test_a_gradient_is_straight_between_its_points() -> None:
    setting = Setting(cases=((None, (0.0, 1.0, 0.5)),))
    points = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert [setting.value("w", p) for p in points] == [0.0, 0.5, 1.0, 0.75, 0.5]


def test_a_gradient_of_one_point_is_constant() -> None:
    assert Setting(cases=((None, (0.3,)),)).value("w", 0.6) == 0.3


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_extremes(points: list[float], position: float) -> None:
    value = Setting(cases=((None, tuple(points)),)).value("w", position)
    assert isinstance(value, float)
    slack = 1e-9 * max(map(abs, points))
    assert min(points) - slack <= value <= max(points) + slack


def test_the_first_filter_that_matches_counts_and_a_star_matches_all() -> None:
    recipe = Recipe.from_yaml(
        LINEAR + "parameters:\n  weight:\n  - {filter: q, value: 1}\n  - {filter: '*', value: 2}\n"
        "  - {filter: k, value: 3}\n"
    )
    setting = recipe.parameters["weight"]
    assert [setting.value(name, 0) for name in ("q_proj", "k_proj")] == [1.0, 2.0]


def test_a_tensor_no_filter_matches_gets_the_recipes_value_and_then_the_default() -> None:
    recipe = Recipe.from_yaml("""\
merge_method: linear
models:
  - model: org/a
    parameters: {weight: [{filter: q, value: 3}]}
  - model: org/b
parameters:
  weight: [{filter: proj, value: 2}]
  normalize: [{filter: q, value: false}]
""")
    assert resolved(recipe, "q_proj") == {"weight": (3.0, 2.0), "normalize": False}
    assert resolved(recipe, "k_proj") == {"weight": (2.0, 2.0), "normalize": True}
    assert resolved(recipe, "norm") == {"weight": (1.0, 1.0), "normalize": True}


@pytest.mark.usefixtures("trimmed")
def test_every_kind_of_parameter_is_read() -> None:
    recipe = Recipe.from_yaml(
        TRIMMED + "parameters: {rank: [2, 8], sign: count, rescale: 1.0, label: y, density: 1e-5}\n"
    )
    assert resolved(recipe, position=0.75) == {
        "weight": (1.0, 1.0),
        "density": (0.25, 1e-5),
        "rank": 6,
        "sign": "count",
        "rescale": True,
        "label": "y",
    }
    assert type(resolved(recipe, position=0.75)["rank"]) is int


@pytest.mark.usefixtures("trimmed")
def test_defaults_come_from_the_declaration() -> None:
    defaults = {"weight": (1.0,), "density": (0.5,), "rank": 4, "sign": "sum", "rescale": False, "label": "x"}
    recipe = Recipe.from_dict({"merge_method": "trimmed", "base_model": "b", "models": [{"model": "a"}]})
    assert resolved(recipe) == defaults


def test_another_method_gets_its_defaults_and_none_of_the_recipes_settings() -> None:
    recipe = Recipe.from_yaml(TASK + "parameters: {weight: 0.3, normalize: true}\n")
    assert recipe.resolve(methods.describe("linear"), "norm", 0.5) == {
        "weight": (1.0, 1.0),
        "normalize": True,
    }


# Rules.

RULES = """\
rules:
  - match: embed|lm_head
    keep: base
  - match: self_attn
    merge_method: linear
    parameters: {weight: [0, 1]}
  - match: layers
    merge_method: task_arithmetic
    parameters: {lambda: 0.5}
"""


def test_the_first_rule_that_matches_counts() -> None:
    recipe = Recipe.from_yaml(TASK + RULES)
    names = ("model.embed_tokens", "layers.0.self_attn", "layers.0.mlp", "norm")
    rules = [recipe.rule_for(name) for name in names]
    assert rules == [*recipe.rules, None]
    assert recipe.rules[0].keep_base
    assert [rule.method for rule in recipe.rules] == [None, "linear", "task_arithmetic"]


def test_a_rules_method_takes_its_settings_from_the_rule_alone() -> None:
    recipe = Recipe.from_yaml(TASK + "parameters: {weight: 0.3, normalize: true}\n" + RULES)
    arguments = recipe.resolve(methods.describe("linear"), "self_attn", 0.5, recipe.rules[1])
    assert arguments == {"weight": (0.5, 0.5), "normalize": True}


def test_a_rule_for_the_recipes_own_method_overrides_only_what_it_sets() -> None:
    recipe = Recipe.from_yaml(TASK + "parameters: {weight: 0.3, lambda: 2, normalize: true}\n" + RULES)
    arguments = resolved(recipe, "layers.0.mlp", rule=recipe.rules[2])
    assert arguments == {"weight": (0.3, 0.3), "lambda_": 0.5, "normalize": True}


@pytest.mark.usefixtures("trimmed")
def test_a_rules_per_expert_setting_counts_for_every_expert() -> None:
    recipe = Recipe.from_yaml(TRIMMED + "rules: [{match: q, merge_method: trimmed, parameters: {density: 0.1}}]\n")
    assert resolved(recipe, "q", rule=recipe.rules[0])["density"] == (0.1, 0.1)
    assert resolved(recipe, "k")["density"] == (0.25, 0.5)


# Models and paths.


def test_the_base_stays_an_expert_of_a_method_without_a_base() -> None:
    recipe = Recipe.from_yaml(LINEAR + "base_model: org/a\n")
    assert [expert.location for expert in recipe.experts] == ["org/a", "org/b"]


def test_the_base_is_recognised_under_another_spelling_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    models = [{"model": f"{tmp_path}/./base/"}, {"model": "org/a"}]
    recipe = Recipe.from_dict({"merge_method": "task_arithmetic", "base_model": tmp_path / "base", "models": models})
    assert [expert.location for expert in recipe.experts] == ["org/a"]


def test_the_same_expert_may_be_given_twice() -> None:
    recipe = Recipe.from_yaml(TASK + "  - model: org/a\n    parameters: {weight: 2}\n")
    assert resolved(recipe)["weight"] == (1.0, 1.0, 2.0)
    assert recipe.names == ("base", "a", "b", "a #2")


def test_names_are_as_short_as_they_can_be_told_apart() -> None:
    models = [{"model": m} for m in ("/data/x/math", "org/math", "org/code/", "math")]
    recipe = Recipe.from_dict({"merge_method": "linear", "models": models})
    assert recipe.names == ("x/math", "org/math", "code", "math")


def test_a_relative_path_starts_at_the_current_folder_or_else_at_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here/a", "there/a", "there/b"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "there" / "recipe.yaml").write_text(LINEAR.replace("org/", "") + "tokenizer_source: b\n")
    monkeypatch.chdir(tmp_path / "here")
    recipe = Recipe.from_file("../there/recipe.yaml")
    assert [expert.location for expert in recipe.experts] == ["a", "../there/b"]
    assert recipe.tokenizer_source == "../there/b"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_tokenizer_or_template_may_come_from_a_model_of_the_recipe() -> None:
    recipe = Recipe.from_yaml(TASK + "tokenizer_source: org/b\nchat_template: org/base\n")
    assert (recipe.tokenizer_source, recipe.chat_template) == ("org/b", "org/base")


@pytest.mark.parametrize("template", ["{{ messages }}", "{% for m in x %}x{% endfor %}", "auto", "base"])
def test_a_template_may_be_written_out(template: str) -> None:
    recipe = Recipe.from_dict(dict(Recipe.from_yaml(TASK).to_dict(), chat_template=template))
    assert recipe.chat_template == template


# Loading.


def test_a_recipe_loads_from_a_path_a_mapping_text_or_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TASK)
    recipe = Recipe.from_yaml(TASK)
    sources: list[Any] = [path, str(path), TASK, recipe.to_dict(), recipe]
    assert all(Recipe.load(source) == recipe for source in sources)
    assert Recipe.load(recipe) is recipe


def test_the_text_is_what_was_written_or_else_the_normal_form() -> None:
    text = TASK + "# a comment\n"
    assert Recipe.from_yaml(text).text == text
    recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": "a"}], "seed": 0})
    assert recipe.text == "merge_method: linear\nmodels:\n- model: a\n"


def test_the_normal_form_holds_neither_defaults_nor_spellings() -> None:
    recipe = Recipe.from_yaml(
        "merge_method: linear\ndtype: bf16\nrounding: nearest\nseed: 0\nparameters:\nrules: []\n"
        "models: [{model: a, parameters: {weight: [{value: 1}]}}]\n"
    )
    assert recipe.to_dict() == {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 1.0}}],
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    ("written", "code"),
    [("float64", "F64"), ("fp32", "F32"), ("torch.float16", "F16"), ("fp16", "F16"), ("bf16", "BF16")],
)
def test_every_spelling_of_a_dtype_means_its_safetensors_code(written: str, code: str) -> None:
    assert Recipe.from_yaml(LINEAR + f"dtype: {written}\n").output_dtype == code


def test_without_a_dtype_the_models_keep_theirs() -> None:
    assert Recipe.from_yaml(LINEAR).output_dtype is None


def test_reading_a_recipe_imports_no_torch() -> None:
    code = f"import sys, streammerge.recipe as r; r.Recipe.load({TASK!r}); print('torch' in sys.modules)"
    root = Path(methods.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# Errors.

LISTS_LINEAR = "`streammerge methods linear` lists its parameters."


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (LINEAR + "dtyp: bf16\n", "5: unknown key `dtyp`", "Did you mean `dtype`?"),
        (
            LINEAR.replace("- model: org/b", "- modle: org/b"),
            "3: unknown key `modle`",
            "Did you mean `model`?",
        ),
        (
            TASK + "rules: [{match: x, method: linear}]\n",
            "6: unknown key `method`",
            "Known here: `match`, `merge_method`, `keep` and `parameters`.",
        ),
        (
            LINEAR + "parameters:\n  weight:\n  - {filtr: q, value: 1}\n",
            "7: unknown key `filtr`",
            "Did you mean `filter`?",
        ),
        (
            LINEAR.replace("linear", "linaer"),
            "4: unknown method `linaer`",
            "Did you mean `linear`? `streammerge methods` lists them.",
        ),
        (
            LINEAR.replace("linear", "average"),
            "4: unknown method `average`",
            "`streammerge methods` lists them.",
        ),
        (
            LINEAR + "parameters:\n  weigth: 1\n",
            "6: unknown parameter `weigth` for method `linear`",
            "Did you mean `weight`? `streammerge methods linear` lists them.",
        ),
        (
            LINEAR + "parameters: {speed: 1}\n",
            "5: unknown parameter `speed` for method `linear`",
            LISTS_LINEAR,
        ),
        (
            LINEAR.replace("org/b", "org/b\n    parameters:\n      normalize: true"),
            "5: `normalize` is one value for the whole merge, found under a model",
            "Move it to `parameters` at the top of the recipe.",
        ),
        (LINEAR + "dtype: float15\n", "5: unknown dtype `float15`", "Did you mean `float16`?"),
        (
            LINEAR + "dtype: int8\n",
            "5: unknown dtype `int8`",
            "Known here: `float64`, `float32`, `float16`, `bfloat16`, `fp64`, `fp32`, `fp16` and `bf16`.",
        ),
        (
            LINEAR + "rounding: stochastc\n",
            "5: `rounding` is the text `stochastc`, expected `nearest` or `stochastic`",
            "Did you mean `stochastic`?",
        ),
        (
            LINEAR + "seed: -1\n",
            "5: `seed` is `-1`, expected a whole number from 0 to 2^63 - 1",
            None,
        ),
        (LINEAR + "seed: 1.5\n", "5: `seed` is `1.5`, expected a whole number", None),
        (LINEAR + "name: [x]\n", "5: `name` is a list, expected text", None),
        (LINEAR + "models: []\n", "5: `models` appears twice, first on line 1", "Keep one of them."),
        (
            "merge_method: linear\nmodels: []\n",
            "2: `models` lists no model",
            "List at least one model to merge.",
        ),
        (
            "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: a}]\n",
            "3: `models` lists only the base model",
            "List at least one model to merge.",
        ),
        ("merge_method: linear\n", "1: `models` is missing", None),
        ("\nmodels: [{model: a}]\n", "2: `merge_method` is missing", None),
        ("merge_method: linear\nmodels: a\n", "2: `models` is the text `a`, expected a list of models", None),
        (
            "merge_method: linear\nmodels: [a]\n",
            "2: `models[0]` is the text `a`, expected a mapping with `model`, `lora`, `parameters` and `key_map`",
            None,
        ),
        (
            "merge_method: linear\nmodels: [{parameters: {weight: 1}}]\n",
            "2: `model` is missing",
            None,
        ),
        (
            "merge_method: linear\nmodels: [{model: 3}]\n",
            "2: `model` is `3`, expected the folder, file or hub name of a model",
            None,
        ),
        (
            "merge_method: linear\nmodels: [{model: ''}]\n",
            "2: `model` is the text ``, expected the folder, file or hub name of a model",
            None,
        ),
        (
            "- a\n",
            "1: `recipe` is a list, expected a mapping with keys such as `merge_method`, `base_model` and `models`",
            None,
        ),
        (
            TASK.replace("base_model: org/base\n", ""),
            "1: method `task_arithmetic` needs a base model",
            "Add `base_model` with the model that the experts were trained from.",
        ),
    ],
)
def test_a_wrong_recipe_names_its_line_and_what_to_do(text: str, message: str, hint: str | None) -> None:
    error = refused(text)
    assert error.message == f"recipe.yaml:{message}"
    assert error.hint == hint


@pytest.mark.usefixtures("trimmed")
def test_an_unknown_parameter_names_its_line_and_the_nearest_parameter() -> None:
    error = refused(TRIMMED.replace("{density: 0.25}", "\n      densty: 0.25"))
    assert error.message == "recipe.yaml:6: unknown parameter `densty` for method `trimmed`"
    assert error.hint == "Did you mean `density`? `streammerge methods trimmed` lists them."


@pytest.mark.usefixtures("trimmed")
@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        (
            "density: high",
            "`density` is the text `high`, expected a number",
            None,
        ),
        (
            "density: true",
            "`density` is `true`, expected a number",
            None,
        ),
        (
            "density: .nan",
            "`density` is `nan`, expected a finite number",
            None,
        ),
        ("density: []", "`density` is a list, expected a number", None),
        (
            "density: [1, x]",
            "`density[1]` is the text `x`, expected a number",
            None,
        ),
        (
            "density: [1, {value: 2}]",
            "`density[1]` is a mapping, expected a number",
            None,
        ),
        ("density: ", "`density` is empty, expected a number", None),
        (
            "density: {value: 1}",
            "`density` is a mapping, expected a value or a list of `filter` and `value`",
            None,
        ),
        ("density: [{filter: q}]", "`value` is missing", None),
        (
            "density: [{value: [[1]]}]",
            "`value[0]` is a list, expected a number",
            None,
        ),
        ("rank: 1.5", "`rank` is `1.5`, expected a whole number", None),
        ("rank: false", "`rank` is `false`, expected a whole number", None),
        (
            "rescale: 2",
            "`rescale` is `2`, expected `true` or `false`",
            None,
        ),
        (
            "rescale: [true]",
            "`rescale` is a list, expected `true` or `false`",
            None,
        ),
        ("label: 1", "`label` is `1`, expected text", None),
        ("sign: cuont", "`sign` is the text `cuont`, expected `sum` or `count`", "Did you mean `count`?"),
    ],
)
def test_a_setting_of_the_wrong_type_says_what_was_found_and_expected(
    setting: str, message: str, hint: str | None
) -> None:
    error = refused(TRIMMED + f"parameters:\n  {setting}\n")
    assert error.message == f"recipe.yaml:8: {message}"
    assert error.hint == (hint or f"`streammerge methods trimmed` explains `{setting.partition(':')[0]}`.")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "merge_method: linear\nmodules: {}\n",
            "2: `modules` merges a model's parts by recipes of their own in mergekit; streammerge has one for all",
            "List the models under `models`, or their layers under `slices`; "
            "`rules` treat tensors differently by name.",
        ),
        (
            LINEAR.replace("org/b", "org/b\n    layer_range: [0, 8]"),
            "4: `layer_range` stands beside a `model` that is not a source of a slice",
            "Remove it to merge all layers, or list the model in a slice's `sources`.",
        ),
        (
            LINEAR + "tokenizer_source: org/a\ntokenizer: {source: org/a}\n",
            "6: `tokenizer` and `tokenizer_source` say the same thing twice",
            "Keep one.",
        ),
        (
            LINEAR + "tokenizer_source: org/aa\n",
            "5: `tokenizer_source` is the text `org/aa`, expected `base`, `union` or a model of this recipe",
            "Did you mean `org/a`?",
        ),
        (
            LINEAR + "tokenizer_source: base\n",
            "5: `tokenizer_source: base` without a base model",
            "Add `base_model`.",
        ),
        (
            LINEAR + "chat_template: base\n",
            "5: `chat_template: base` without a base model",
            "Add `base_model`.",
        ),
        (
            LINEAR + "chat_template: chatml\n",
            "5: `chat_template` is the text `chatml`, expected `auto`, `base`, a model of this recipe, "
            "or a template with `{{` or `{%`",
            "mergekit bundles this template; write its text here.",
        ),
        (
            LINEAR + "chat_template: elsewhere\n",
            "5: `chat_template` is the text `elsewhere`, expected `auto`, `base`, a model of this recipe, "
            "or a template with `{{` or `{%`",
            "Known here: `auto`, `base`, `org/a` and `org/b`.",
        ),
    ],
)
def test_what_only_mergekit_has_gets_an_answer_of_its_own(text: str, message: str, hint: str | None) -> None:
    error = refused(text)
    assert error.message == f"recipe.yaml:{message}"
    assert error.hint == hint


@pytest.mark.parametrize(
    ("rule", "message", "hint"),
    [
        ("match: x", "a rule has `merge_method` or `keep`, found neither", None),
        (
            "match: x, keep: base, merge_method: linear",
            "a rule has `merge_method` or `keep`, found both",
            None,
        ),
        ("keep: base", "`match` is missing", None),
        ("match: x, keep: all", "`keep` is the text `all`, expected `base`", None),
        ("match: x, keep: base", "`keep: base` without a base model", "Add `base_model`."),
        (
            "match: x, merge_method: task_arithmetic",
            "method `task_arithmetic` needs a base model",
            "Add `base_model` with the model that the experts were trained from.",
        ),
        (
            "match: '(', merge_method: linear",
            "`(` is not a regular expression: missing ), unterminated subpattern at position 0",
            "Quote it in YAML with single quotes: '…'.",
        ),
        (
            "match: x, merge_method: linear, parameters: {speed: 1}",
            "unknown parameter `speed` for method `linear`",
            LISTS_LINEAR,
        ),
    ],
)
def test_a_wrong_rule_names_its_line(rule: str, message: str, hint: str | None) -> None:
    error = refused(LINEAR + f"rules:\n- {{{rule}}}\n")
    assert error.message == f"recipe.yaml:6: {message}"
    assert error.hint == hint


def test_a_rule_that_keeps_the_base_has_no_parameters() -> None:
    error = refused(TASK + "rules:\n- {match: x, keep: base, parameters: {weight: 1}}\n")
    assert error.message == "recipe.yaml:7: `parameters` beside `keep`, which has none"
    assert error.hint == "Remove them."


def test_an_error_in_a_mapping_names_its_path() -> None:
    models = [{"model": "a"}, {"model": "b", "parameters": {"weight": "high"}}]
    error = refused({"merge_method": "linear", "models": models})
    expected = "recipe.models[1].parameters.weight: `weight` is the text `high`, expected a number"
    assert error.message == expected


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(LINEAR + "dtype: 1\n")
    with pytest.raises(RecipeError) as raised:
        Recipe.load(path)
    assert raised.value.message == f"{path}:5: `dtype` is `1`, expected a dtype"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    for name, reason in (
        ("none.yaml", "does not exist"),
        ("", "cannot be read: Is a directory"),
        ("latin.yaml", "is not UTF-8 text"),
        ("large.yaml", "is larger than 1 MiB, which no recipe is"),
    ):
        with pytest.raises(RecipeError) as raised:
            Recipe.load(tmp_path / name)
        assert raised.value.message == f"`{tmp_path / name}` {reason}"


# Round trip.

numbers = st.floats(-1e9, 1e9) | st.integers(-1000, 1000)
curves = numbers | st.lists(numbers, min_size=1, max_size=4)
cases = st.lists(
    st.fixed_dictionaries({"value": curves}, optional={"filter": st.none() | st.just("*") | st.text(max_size=6)}),
    min_size=1,
    max_size=3,
)
number_settings = curves | cases
weights = st.fixed_dictionaries({}, optional={"weight": number_settings})
parameters = st.fixed_dictionaries(
    {}, optional={"weight": number_settings, "lambda": number_settings, "normalize": st.booleans()}
)
locations = st.text(min_size=1, max_size=8).filter(lambda text: "+" not in text) | st.sampled_from(
    ["org/a", "./b/", "1e5", "null", "yes", "2024-01-01", "a: b", "é\x85"]
)
rules = st.one_of(
    st.fixed_dictionaries({"match": st.sampled_from(["x", "^a.*$", r"\.\d+\."]), "keep": st.just("base")}),
    st.fixed_dictionaries(
        {"match": st.sampled_from(["q", "[kv]"]), "merge_method": st.just("linear"), "parameters": weights}
    ),
)
models = st.fixed_dictionaries({"model": locations}, optional={"parameters": weights})
recipes = st.fixed_dictionaries(
    {
        "merge_method": st.just("task_arithmetic"),
        "base_model": st.just("the base"),
        "models": st.lists(
            st.fixed_dictionaries({"model": locations}, optional={"parameters": weights}),
            min_size=1,
            max_size=3,
        ),
    },
    optional={
        "parameters": parameters,
        "rules": st.lists(rules, max_size=3),
        "dtype": st.sampled_from(["bf16", "torch.float32", "float64"]),
        "out_dtype": st.sampled_from(["fp16", "bfloat16"]),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
        "seed": st.integers(0, 2**63 - 1),
        "tokenizer_source": st.sampled_from(["base", "union", "the base"]),
        "chat_template": st.sampled_from(["auto", "base", "the base", "{{ 'é\n' }}"]),
        "name": st.text(max_size=5),
    },
)


@settings(max_examples=150, deadline=None)
@given(recipes)
def test_the_normal_form_and_the_text_load_to_an_equal_recipe(mapping: dict[str, object]) -> None:
    recipe = Recipe.from_dict(mapping)
    plain = recipe.to_dict()
    assert Recipe.from_dict(plain) == recipe
    assert Recipe.from_dict(plain).to_dict() == plain
    assert Recipe.from_yaml(recipe.text) == recipe
