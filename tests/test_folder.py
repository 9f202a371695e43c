from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from streammerge import folder
from streammerge.card import plain
from streammerge.checkpoint import FileFacts
from streammerge.errors import CheckpointError, PlanError
from streammerge.folder import side_files, template_of
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from streammerge.storage.local import LocalStorage
from tests.models import CONFIG, llama_tensors, recipe_of, save_model

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
HINT = "Name a model that has one, or leave it out."


class Watched(LocalStorage):
    """Notes which files were read."""

    def __init__(self) -> None:
        super().__init__()
        self.read_paths: list[Path] = []

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        self.read_paths.append(Path(location) / name)
        return super().read(location, name, offset, nbytes)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    tensors = {"model.norm.weight": llama_tensors()["model.norm.weight"]}
    return {name: save_model(tmp_path / name, tensors) for name in ("base", "math", "code")}


def plan_of(models: Mapping[str, Path], **more: object) -> Plan:
    return make_plan(Recipe.from_dict(recipe_of(models, "linear", **more)), LocalStorage(), memory_bytes=1 << 30)


def beside(models: Mapping[str, Path], **more: object) -> dict[str, bytes]:
    return side_files(plan_of(models, **more), LocalStorage())


def refused(models: Mapping[str, Path], **more: object) -> PlanError:
    with pytest.raises(PlanError) as raised:
        beside(models, **more)
    return raised.value


def put(model: Path, files: Mapping[str, object]) -> None:
    for name, content in files.items():
        (model / name).write_text(content if isinstance(content, str) else json.dumps(content))


# which files


def test_the_folder_holds_what_makes_the_base_a_model(models: dict[str, Path]) -> None:
    assert beside(models).keys() == {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    put(models["base"], {
        "generation_config.json": {}, "preprocessor_config.json": {}, "special_tokens_map.json": {},
        "vocab.json": {}, "merges.txt": "", "tokenizer.model": "", "qwen.tiktoken": "", "chat_template.jinja": "x",
        "modeling_own.py": "import os", "LICENSE": "…", "LICENSE.txt": "…", "NOTICE": "…",
    })  # fmt: skip
    assert beside(models).keys() == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
        "generation_config.json", "preprocessor_config.json", "special_tokens_map.json",
        "vocab.json", "merges.txt", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja",
        "modeling_own.py", "LICENSE", "LICENSE.txt", "NOTICE",
    }  # fmt: skip


def test_weights_indexes_and_traces_of_training_stay_behind(models: dict[str, Path]) -> None:
    before = beside(models).keys()
    put(models["base"], {
        "model.safetensors.index.json": {"weight_map": {}}, "pytorch_model.bin": "x",
        "pytorch_model.bin.index.json": {}, "consolidated.pth": "x", "optimizer.pt": "x", "scheduler.pt": "x",
        "rng_state_0.pth": "x", "training_args.bin": "x", "trainer_state.json": {}, "all_results.json": {},
        "train_results.json": {}, "eval_results.json": {}, "adapter_config.json": {}, "model.gguf": "x",
        "streammerge.json": {}, "model.h5": "x", "model.onnx": "x", ".gitattributes": "x", "events.out.tfevents": "x",
    })  # fmt: skip
    (models["base"] / "runs").mkdir()
    (models["base"] / "runs" / "config.json").write_text("{}")
    assert beside(models).keys() == before


def test_files_are_copied_byte_for_byte(models: dict[str, Path]) -> None:
    content = b'{"a":  1,\r\n "\xc3\xa9": NaN}\x00'
    (models["base"] / "generation_config.json").write_bytes(content)
    (models["base"] / "tokenizer.json").write_bytes(content)
    found = beside(models)
    assert found["generation_config.json"] == found["tokenizer.json"] == content


def test_nothing_but_the_models_own_files_is_read(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("not ours")
    put(models["math"], {"chat_template.jinja": TEMPLATE})
    storage = Watched()
    side_files(plan_of(models, chat_template="auto", tokenizer_source=str(models["code"])), storage)
    assert storage.read_paths
    for path in storage.read_paths:
        assert path.parent in models.values()
        assert path.suffix != ".safetensors"


def test_code_in_a_model_is_copied_and_not_run(models: dict[str, Path], tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    put(models["base"], {"modeling_own.py": code, "config.json": {**CONFIG, "auto_map": {"AutoModel": "own.M"}}})
    assert beside(models)["modeling_own.py"] == code.encode()
    assert not (tmp_path / "ran").exists()


def test_a_side_file_too_large_to_be_one_is_refused_not_left_out(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(models["base"], {"huge.json": "x" * 5000})
    monkeypatch.setattr(folder, "LIMIT_BYTES", 4000)
    with pytest.raises(PlanError, match=r"base/huge\.json` has 5000 bytes, over the limit of 4000") as raised:
        beside(models)
    assert raised.value.hint == "Files beside the weights are small. Move it out of the model's folder."


def test_a_file_that_is_gone_since_planning_is_named(models: dict[str, Path]) -> None:
    plan = plan_of(models)
    os.unlink(models["base"] / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"base/tokenizer\.json` cannot be read: no such file or directory"):
        side_files(plan, LocalStorage())


def test_without_a_base_the_first_expert_lends_its_files(models: dict[str, Path]) -> None:
    put(models["math"], {"generation_config.json": {"from": "math"}})
    put(models["code"], {"generation_config.json": {"from": "code"}})
    recipe = {"merge_method": "linear", "models": [{"model": str(models[name])} for name in ("math", "code")]}
    plan = make_plan(Recipe.from_dict(recipe), LocalStorage(), memory_bytes=1 << 30)
    assert json.loads(side_files(plan, LocalStorage())["generation_config.json"]) == {"from": "math"}


# the config


@pytest.mark.parametrize(("key", "name"), [("dtype", "float32"), ("out_dtype", "float16")])
def test_the_config_says_the_dtype_that_is_written(key: str, name: str, models: dict[str, Path]) -> None:
    put(models["base"], {"config.json": {**CONFIG, "torch_dtype": "bfloat16"}})
    written = json.loads(beside(models, **{key: name})["config.json"])
    assert written == {**CONFIG, "dtype": name, "torch_dtype": name}
    assert list(written)[: len(CONFIG)] == list(CONFIG)


def test_a_config_that_names_no_dtype_gets_none(models: dict[str, Path]) -> None:
    put(models["base"], {"config.json": {"model_type": "llama", "name": "é"}})
    assert beside(models, dtype="float32")["config.json"] == '{\n  "model_type": "llama",\n  "name": "é"\n}\n'.encode()


def test_without_a_dtype_the_config_keeps_its_own(models: dict[str, Path]) -> None:
    assert json.loads(beside(models)["config.json"]) == CONFIG


def test_a_model_without_a_config_stays_without(models: dict[str, Path]) -> None:
    os.unlink(models["base"] / "config.json")
    assert "config.json" not in beside(models)


# the tokenizer


def test_the_tokenizer_is_the_bases_unless_another_is_named(models: dict[str, Path]) -> None:
    put(models["base"], {"merges.txt": "base", "generation_config.json": {"from": "base"}})
    put(models["math"], {"tokenizer.json": {"from": "math"}, "generation_config.json": {"from": "math"}})
    for source in ({}, {"tokenizer_source": "base"}):
        assert json.loads(beside(models, **source)["tokenizer.json"]) == {"version": "1.0"}
    found = beside(models, tokenizer_source=str(models["math"]))
    assert json.loads(found["tokenizer.json"]) == {"from": "math"}
    assert json.loads(found["generation_config.json"]) == {"from": "base"}
    # not half of one tokenizer and half of another
    assert "merges.txt" not in found


def test_a_named_model_without_a_tokenizer_is_refused(models: dict[str, Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.unlink(models["math"] / name)
    error = refused(models, tokenizer_source=str(models["math"]))
    assert error.message == f"`tokenizer_source: {models['math']}` finds no tokenizer"
    assert error.hint == HINT
    assert "tokenizer.json" in beside(models)


# the chat template


@pytest.fixture
def templates(models: dict[str, Path]) -> dict[str, Path]:
    put(models["base"], {"chat_template.jinja": "base"})
    put(models["math"], {"tokenizer_config.json": {"eos_token": "</s>", "chat_template": "math"}})
    put(models["code"], {"chat_template.jinja": "math"})
    return models


def test_without_a_choice_the_template_comes_with_the_tokenizer(templates: dict[str, Path]) -> None:
    assert beside(templates)["chat_template.jinja"] == b"base"
    found = beside(templates, tokenizer_source=str(templates["math"]))
    assert "chat_template.jinja" not in found
    assert json.loads(found["tokenizer_config.json"])["chat_template"] == "math"


def test_the_bases_template_can_be_named(templates: dict[str, Path]) -> None:
    found = beside(templates, chat_template="base", tokenizer_source=str(templates["math"]))
    assert found["chat_template.jinja"] == b"base"
    # one place says it, not two that may disagree
    assert json.loads(found["tokenizer_config.json"]) == {"eos_token": "</s>"}


def test_a_models_template_may_lie_in_its_tokenizer_config(templates: dict[str, Path]) -> None:
    assert beside(templates, chat_template=str(templates["math"]))["chat_template.jinja"] == b"math"


def test_auto_takes_the_template_that_most_models_have(templates: dict[str, Path]) -> None:
    assert beside(templates, chat_template="auto")["chat_template.jinja"] == b"math"


def test_auto_takes_the_earlier_models_template_where_several_are_as_common(templates: dict[str, Path]) -> None:
    put(templates["code"], {"chat_template.jinja": "code"})
    assert beside(templates, chat_template="auto")["chat_template.jinja"] == b"base"
    os.unlink(templates["base"] / "chat_template.jinja")
    assert beside(templates, chat_template="auto")["chat_template.jinja"] == b"math"


def test_a_template_may_stand_in_the_recipe(templates: dict[str, Path]) -> None:
    put(templates["base"], {"chat_template.json": {"chat_template": "old"}})
    found = beside(templates, chat_template=TEMPLATE)
    assert found["chat_template.jinja"] == TEMPLATE.encode()
    assert "chat_template.json" not in found


@pytest.mark.parametrize("choice", ["auto", "base"])
def test_a_template_that_is_nowhere_is_refused(choice: str, models: dict[str, Path]) -> None:
    error = refused(models, chat_template=choice)
    assert error.message == f"`chat_template: {choice}` finds no chat template"
    assert error.hint == HINT


def test_a_named_model_without_a_template_is_refused(templates: dict[str, Path]) -> None:
    os.unlink(templates["code"] / "chat_template.jinja")
    error = refused(templates, chat_template=str(templates["code"]))
    assert error.message == f"`chat_template: {templates['code']}` finds no chat template"


def test_a_models_own_template_file_goes_before_its_tokenizer_config(templates: dict[str, Path]) -> None:
    put(templates["math"], {"chat_template.jinja": "newer"})
    model = plan_of(templates).models[1]
    assert template_of(LocalStorage(), model) == "newer"


@pytest.mark.parametrize("config", ["[]", '{"chat_template": 3}', "{}"])
def test_a_tokenizer_config_may_hold_no_template(config: str, models: dict[str, Path]) -> None:
    put(models["math"], {"tokenizer_config.json": config})
    assert template_of(LocalStorage(), plan_of(models).models[1]) is None


def test_a_damaged_tokenizer_config_is_named_when_it_is_asked(models: dict[str, Path]) -> None:
    put(models["math"], {"tokenizer_config.json": "{"})
    with pytest.raises(CheckpointError, match=r"math/tokenizer_config\.json` does not hold readable JSON"):
        beside(models, chat_template="auto")


# the card


def card_of(files: Mapping[str, bytes]) -> tuple[dict[str, object], str]:
    _, head, body = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_was_merged_and_holds_the_recipe(models: dict[str, Path]) -> None:
    text = (
        "# how it was made: é\nmerge_method: linear\n"
        f"base_model: {models['base']}\nmodels:\n- model: {models['math']}\n- model: {models['code']}\n"
    )
    plan = make_plan(Recipe.from_yaml(text), LocalStorage(), memory_bytes=1 << 30)
    head, body = card_of(side_files(plan, LocalStorage()))
    # no names on the hub, and it refuses others
    assert head == {"library_name": "transformers", "tags": ["merge", "streammerge"]}
    assert body.startswith("\n# math + code\n\nMerged with streammerge by `linear`.\n")
    assert f"```yaml\n{text}```\n" in body


def test_the_card_has_the_recipes_name_for_a_title(models: dict[str, Path]) -> None:
    assert "# My model\n" in card_of(beside(models, name="My model"))[1]


def test_a_recipe_with_backticks_stays_in_its_fence(models: dict[str, Path]) -> None:
    _, body = card_of(beside(models, chat_template="````\n{{ messages }}"))
    assert "\n`````yaml\n" in body
    assert body.endswith("\n`````\n")


def test_an_odd_location_does_not_break_the_card(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": llama_tensors()["model.norm.weight"]}
    odd = {name: save_model(tmp_path / name, tensors) for name in ("base: [x", 'quo"te #1', "new\nline")}
    recipe = {"merge_method": "linear", "models": [{"model": str(path)} for path in odd.values()]}
    plan = make_plan(Recipe.from_dict(recipe), LocalStorage(), memory_bytes=1 << 30)
    _, body = card_of(side_files(plan, LocalStorage()))
    assert [line for line in body.splitlines() if line.endswith("beside the weights")] == [
        f"- {plain(path)}: unknown: no card lies beside the weights" for path in odd.values()
    ]


def test_an_earlier_card_is_replaced(models: dict[str, Path]) -> None:
    put(models["base"], {"README.md": "the base's own"})
    assert b"the base's own" not in beside(models)["README.md"]


def test_files_are_asked_for_with_the_size_they_had(models: dict[str, Path]) -> None:
    plan = plan_of(models)
    assert plan.models[0].files["tokenizer.json"] == FileFacts(
        (models["base"] / "tokenizer.json").stat().st_size, (models["base"] / "tokenizer.json").stat().st_mtime_ns
    )
