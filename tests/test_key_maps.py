"""Names that differ and mean the same are mapped, and nothing else is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammerge
from streammerge.cli import cli
from streammerge.errors import PlanError, RecipeError
from streammerge.key_maps import KeyMap, find_map, given_map, map_names
from streammerge.recipe import Recipe
from tests.models import CONFIG, llama_tensors, save_model, tuned
from tests.stored import tensors_of

LLAMA = [name for name in llama_tensors() if name != "model.position_ids"]
BARE = [name.removeprefix("model.") for name in LLAMA if name != "lm_head.weight"]
# of a vision-language model, as versions 4 and 5 of transformers and the hub's files have them
OLD = [
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.mlp.up_proj.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
    "multi_modal_projector.linear_1.weight",
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
]
NEW = [
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.mlp.up_proj.weight",
    "model.language_model.norm.weight",
    "lm_head.weight",
    "model.multi_modal_projector.linear_1.weight",
    "model.vision_tower.embeddings.class_embedding",
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
]
QWEN_OLD = ["model.layers.0.mlp.up_proj.weight", "visual.blocks.0.norm1.weight", "lm_head.weight", "model.norm.weight"]
QWEN_NEW = [
    "model.language_model.layers.0.mlp.up_proj.weight",
    "model.visual.blocks.0.norm1.weight",
    "lm_head.weight",
    "model.language_model.norm.weight",
]
BERT = ["bert.encoder.layer.0.output.LayerNorm.weight", "bert.encoder.layer.0.output.LayerNorm.bias"]
TENSORFLOW = ["encoder.layer.0.output.LayerNorm.gamma", "encoder.layer.0.output.LayerNorm.beta"]
GPT2 = ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight", "transformer.ln_f.bias"]


def wrapped(names: Iterable[str]) -> list[str]:
    return [f"module._orig_mod.{name}" for name in names]


def inside(names: Iterable[str]) -> list[str]:
    return [name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.") for name in names]


PAIRS = {
    "without a head": (LLAMA[:-1], BARE),
    "compiled and in parallel": (LLAMA, wrapped(LLAMA)),
    "wrapped inside": (LLAMA, inside(LLAMA)),
    "a vision-language model between versions": (OLD, NEW),
    "one whose text lies at the top": (QWEN_OLD, QWEN_NEW),
    "a BERT of TensorFlow": (BERT, TENSORFLOW),
    "a GPT-2 without its transformer": (GPT2, [name.removeprefix("transformer.") for name in GPT2]),
}


@pytest.mark.parametrize(("left", "right"), PAIRS.values(), ids=PAIRS)
def test_names_are_mapped_either_way(left, right):
    for reference, names in ((left, right), (right, left)):
        assert find_map(reference, names).renamed == {
            old: new for old, new in zip(names, reference, strict=True) if old != new
        }


@pytest.mark.parametrize("names", [LLAMA, BARE, OLD, NEW, QWEN_OLD, QWEN_NEW, BERT, TENSORFLOW, GPT2])
def test_a_model_is_mapped_to_itself_by_nothing(names):
    assert find_map(names, names) == KeyMap(renamed={})


def test_models_of_other_depths_are_mapped_layer_by_layer():
    reference = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
    found = find_map(reference, [f"layers.{n}.mlp.up_proj.weight" for n in range(9)])
    assert found.renamed["layers.8.mlp.up_proj.weight"] == "model.layers.8.mlp.up_proj.weight"


def test_what_corresponds_to_nothing_keeps_its_name():
    found = find_map(["model.norm.weight"], ["norm.weight", "score.weight"])
    assert found.renamed == {"norm.weight": "model.norm.weight"}


@pytest.mark.parametrize(
    ("reference", "names"),
    [
        (["model.norm.weight", "bert.norm.weight"], ["norm.weight"]),
        (["norm.weight"], ["model.norm.weight", "bert.norm.weight"]),
        (["norm.weight"], ["model.norm.gamma", "model.norm.weight"]),
    ],
)
def test_names_that_could_be_several_are_refused(reference, names):
    with pytest.raises(PlanError) as caught:
        find_map(reference, names, "b")
    assert caught.value.message.startswith("the names of `b` are ambiguous: `")
    assert "key_map" in str(caught.value.hint)


def test_an_equal_name_is_never_taken_for_another():
    reference, names = ["model.norm.weight", "norm.weight"], ["norm.weight", "bert.norm.weight"]
    assert find_map(reference, names).renamed == {"bert.norm.weight": "model.norm.weight"}


names_of_parts = st.lists(
    st.sampled_from(
        ["model", "module", "layers", "0", "1", "norm", "weight", "gamma", "visual", "language_model", "\0"]
    ),
    min_size=1,
    max_size=5,
).map(".".join)


@settings(deadline=None)
@given(st.sets(names_of_parts, max_size=12), st.sets(names_of_parts, max_size=12))
def test_a_map_is_one_to_one_and_touches_no_equal_name(reference, names):
    try:
        renamed = find_map(reference, names).renamed
    except PlanError:
        return
    after = [renamed.get(name, name) for name in names]
    assert len(set(after)) == len(after)
    assert not renamed.keys() & reference
    assert renamed.keys() <= names


def test_eighteen_thousand_names_are_mapped_in_well_under_a_second():
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(48)
        for expert in range(128)
        for part in ("gate", "up", "down")
    ]
    began = time.process_time()
    found = find_map(names, [f"language_model.{name}" for name in names])
    assert time.process_time() - began < 0.8
    assert len(found.renamed) == len(names) == 18_432


def test_a_summary_counts_what_is_replaced():
    assert find_map(LLAMA[:-1], BARE).summary() == f"`` → `model.` ({len(BARE)})"
    assert find_map(OLD, NEW).summary() == (
        "`model.language_model.` → `language_model.model.` (3), "
        "`model.vision_tower.` → `vision_tower.vision_model.` (2), `` → `language_model.` (1), …"
    )
    assert find_map(BERT, [name.replace("weight", "gamma") for name in BERT]).summary() == "`gamma` → `weight` (1)"


# a recipe's map


def test_the_first_pattern_that_matches_renames():
    rules = ((r"^blocks\.(\d+)", r"model.layers.\1"), ("^blocks", "never"), ("q$", "p"))
    found, unused = given_map(["blocks.3.up", "blocks.up", "q"], rules, "b")
    assert found.renamed == {"blocks.3.up": "model.layers.3.up", "blocks.up": "never.up", "q": "p"}
    assert unused == ()
    assert given_map(["q"], rules, "b")[1] == (rules[0][0], "^blocks")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("[ab]", "c"),), "`key_map` makes `c` of both `a` and `b` in `x`"),
        (((".*", ""),), "`key_map` makes nothing of `a` in `x`"),
        ((("a", "c" * 5000),), "`key_map` makes 5000 characters, over the limit of 4096 of `a` in `x`"),
    ],
)
def test_a_map_that_is_none_is_refused(rules, message):
    with pytest.raises(PlanError) as caught:
        given_map(["a", "b"], rules, "x")
    assert caught.value.message == message


def test_a_pattern_without_end_is_refused_in_no_time():
    began = time.process_time()
    assert given_map(["a" * 60 + "!"], (("(a+)+$", "b"),), "x")[1] == ("(a+)+$",)
    with pytest.raises(PlanError) as caught:
        given_map(["a" * 60], (("(a+)+$", "b"),), "x")
    assert caught.value.message.startswith("a `key_map`'s `(a+)+$` takes too long to look for in `aaa")
    assert time.process_time() - began < 1


def test_a_recipe_keeps_its_maps():
    recipe = Recipe.from_yaml(
        "merge_method: linear\nmodels:\n- model: a\n- model: b\n  key_map: {'^net\\.': 'model.', head: lm_head}\n"
    )
    assert recipe.experts[1].key_map == ((r"^net\.", "model."), ("head", "lm_head"))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[a]", "`key_map` is a list, expected a mapping of patterns to replacements"),
        ("{'(': b}", "`(` is not a regular expression"),
        ("{a: 1}", "`a` is `1`, expected a replacement"),
        (r"{a: '\1'}", r"`\1` is no replacement for `a`: invalid group reference 1"),
        (f"{{a: {'b' * 2000}}}", "a replacement of more than 1000 characters"),
    ],
)
def test_a_map_that_cannot_be_read_is_refused_with_its_line(written, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(f"merge_method: linear\nmodels:\n- model: a\n  key_map: {written}\n")
    assert caught.value.message.startswith("recipe.yaml:4: ")
    assert message.replace("`", "") in caught.value.message.replace("\\\\", "\\").replace("`", "")


def test_the_base_takes_no_map():
    text = "merge_method: ties\nbase_model: a\nmodels:\n- {model: a, key_map: {x: y}}\n- model: b\n"
    with pytest.raises(RecipeError, match="`key_map` of the base, whose names all others are mapped to"):
        Recipe.from_yaml(text)


# merges


def renamed(tensors: Mapping[str, Tensor], change: Callable[[str], str | None]) -> dict[str, Tensor]:
    return {new: tensor for name, tensor in tensors.items() if (new := change(name)) is not None}


def merged(family: Mapping[str, Path], folder: Path, *others: Path, **more: object) -> dict[str, Tensor]:
    models = [{"model": str(each), **more} for each in others]
    streammerge.merge(
        {"merge_method": "ties", "base_model": str(family["base"]), "models": models, "out_dtype": "float32"}, folder
    )
    return tensors_of(folder)


def test_a_model_under_other_names_is_merged_like_itself(family, tmp_path):
    expected = merged(family, tmp_path / "expected", family["math"], family["code"])
    other = save_model(
        tmp_path / "other", renamed(tensors_of(family["math"]), lambda name: f"module.{name.replace('model.', '')}")
    )
    found = merged(family, tmp_path / "found", other, family["code"])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    planned = streammerge.plan(tmp_path / "found" / "streammerge.json")
    count = len(expected)
    assert planned.warnings == (f"names of `other` are mapped: `module.` → `model.` ({count - 1}), `module.` → `` (1)",)
    assert streammerge.verify(tmp_path / "found", recompute=50).problems == ()


def test_a_given_map_is_used_instead(family, tmp_path):
    expected = merged(family, tmp_path / "expected", family["math"])
    other = save_model(tmp_path / "other", renamed(tensors_of(family["math"]), lambda name: f"net/{name}"))
    with pytest.raises(PlanError, match="the models do not fit together") as caught:
        merged(family, tmp_path / "refused", other)
    assert "and" in caught.value.message
    assert "key_map" in str(caught.value.hint)
    found = merged(family, tmp_path / "found", other, key_map={"^net/": "", "nothing": "at all"})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    warnings = streammerge.plan(tmp_path / "found" / "streammerge.json").warnings
    assert "`key_map` of `other`: `nothing` matches none of its names" in warnings


@pytest.mark.parametrize(("prefix", "key_map"), [("", {}), ("net/", {"^net/": "model."})], ids=["bare", "given"])
def test_layers_under_other_names_are_stacked_on_those_of_the_first_model(tmp_path, prefix, key_map):
    whole = llama_tensors(1)
    other = renamed(llama_tensors(2), lambda name: name.replace("model.", prefix))
    if key_map:
        other["net/lm_head.weight"] = other.pop("lm_head.weight")
        key_map = {"^net/lm_head": "lm_head", **key_map}
    a, b = save_model(tmp_path / "a", whole), save_model(tmp_path / "b", other)
    sources = {"model": str(a), "layer_range": [0, 2]}, {"model": str(b), "layer_range": [1, 2], "key_map": key_map}
    recipe = {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources]}
    streammerge.merge(recipe, tmp_path / "out")
    name = "self_attn.q_proj.weight"
    found = tensors_of(tmp_path / "out")[f"model.layers.2.{name}"]
    torch.testing.assert_close(found, other[f"{prefix}layers.1.{name}"], rtol=0, atol=0)


def test_what_lies_beside_a_model_has_its_names(tmp_path):
    base = llama_tensors()
    matrix = "model.layers.0.self_attn.q_proj.weight"
    folders = {"base": save_model(tmp_path / "base", base)}
    for seed, name in enumerate("ab", start=1):
        tensors = tuned(base, seed)
        data = {matrix: torch.eye(16) * seed}
        if name == "b":
            tensors, data = (renamed(each, lambda old: f"module.{old}") for each in (tensors, data))
        folders[name] = save_model(tmp_path / name, tensors)
        folders[f"{name} data"] = save_model(tmp_path / f"{name} data", data)
    planned = streammerge.plan({
        "merge_method": "regmean",
        "base_model": str(folders["base"]),
        "models": [{"model": str(folders[name]), "covariance": str(folders[f"{name} data"])} for name in "ab"],
        "parameters": {"missing": "mean"},
    })  # fmt: skip
    (step,) = [step for step in planned.steps if step.name == matrix]
    assert [place is not None for place in step.beside] == [True, True]


# what some models do not hold


def test_buffers_that_models_compute_need_not_be_in_all(family, tmp_path):
    base = tensors_of(family["math"])
    without = {name: tensor for name, tensor in base.items() if name != "model.position_ids"}
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(2) for n in range(2)}
    other = save_model(tmp_path / "other", without | frequencies)
    found = merged(family, tmp_path / "found", other)
    expected = merged(family, tmp_path / "expected", family["math"])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    warnings = streammerge.plan(tmp_path / "found" / "streammerge.json").warnings
    assert "those of `base` are copied" in warnings[0]
    assert "left out" in warnings[1]


def test_a_head_may_be_missing_under_another_prefix_where_it_is_tied(tmp_path):
    whole = llama_tensors()
    headless = renamed(tuned(whole, 1), lambda name: None if name == "lm_head.weight" else name.removeprefix("model."))
    folders = [save_model(tmp_path / "whole", whole), save_model(tmp_path / "bare", headless)]
    recipe = {"merge_method": "linear", "models": [{"model": str(folder)} for folder in folders]}
    with pytest.raises(PlanError) as caught:
        streammerge.plan(recipe)
    assert "`lm_head.weight` is in `whole` but not in `bare`" in caught.value.message
    (folders[1] / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    (folders[0] / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    planned = streammerge.plan(recipe)
    assert "lm_head.weight" in {step.name for step in planned.steps}
    assert any("ties its head to its embedding" in warning for warning in planned.warnings)


def test_nothing_else_is_left_out(family):
    models = [streammerge.inspect(family[name]).models[0] for name in ("base", "math")]
    mapped = map_names(models, ["base", "math"])
    assert mapped.models == tuple(models)
    assert mapped.notes == ()


# inspect


def test_inspect_shows_what_maps_to_what(family, tmp_path, capsys):
    tensors = tensors_of(family["math"])
    other = save_model(tmp_path / "other", renamed(tensors, lambda name: f"module.{name}"))
    arguments = ["inspect", str(family["base"]), str(other)]
    cli.main(arguments, standalone_mode=False)
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [
        f"names of `{other}` are mapped: `module.` → `` ({len(tensors)})",
        "so the same names and shapes in all",
    ]
    cli.main([*arguments, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["key_maps"] == [{}, {f"module.{name}": name for name in tensors}]
    assert found["differences"] == []
    # as the files have them
    assert {each["name"] for each in found["models"][1]["tensors"]} == {f"module.{name}" for name in tensors}


def test_names_that_are_ambiguous_can_be_looked_at(tmp_path):
    one = save_model(tmp_path / "one", {"norm.weight": torch.ones(2)})
    two = save_model(tmp_path / "two", {"model.norm.weight": torch.ones(2), "bert.norm.weight": torch.ones(2)})
    found = streammerge.inspect(one, two)
    assert found.notes[0].startswith(f"the names of `{two}` are ambiguous: ")
    assert len(found.differences) == 3
    with pytest.raises(PlanError):
        streammerge.plan({"merge_method": "linear", "models": [{"model": str(each)} for each in (one, two)]})


def test_a_bare_bert_and_one_with_a_head_agree_on_what_both_have(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for name in ("BertModel", "BertForMaskedLM"):
        getattr(transformers, name)(config).save_pretrained(tmp_path / name)
    found = streammerge.inspect(tmp_path / "BertForMaskedLM", tmp_path / "BertModel")
    assert found.maps[1].renamed
    assert all(new == f"bert.{old}" for old, new in found.maps[1].renamed.items())
    assert all("cls." in line or "pooler" in line for line in found.differences)
