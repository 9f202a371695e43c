"""Layers stacked from several models: bytes, config.json, what is refused, and a merge of stacks against float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammerge
from streammerge.checkpoint import Checkpoint, TensorEntry
from streammerge.cli import cli
from streammerge.errors import PlanError
from streammerge.plan import make_plan
from streammerge.recipe import Recipe
from streammerge.stacked_config import config_warnings, stacked_config
from streammerge.stacking import is_above
from streammerge.storage.local import LocalStorage
from tests.models import CONFIG, LAYERS, llama_tensors, save_model
from tests.stored import tensors_of
from tests.test_device_stream import merged, same_bytes

ABOVE = ("model.norm.weight", "lm_head.weight")


def source(folder: object, first: int, end: int, **more: object) -> dict[str, object]:
    return {"model": str(folder), "layer_range": [first, end], **({"parameters": more} if more else {})}


def stack(*slices: object, method: str = "passthrough", **more: object) -> dict[str, object]:
    parts = [{"sources": part if isinstance(part, list) else [part]} for part in slices]
    return {"merge_method": method, "slices": parts, **more}


def layer(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """Two models that have nothing in common but their shapes; one is sharded."""
    return {name: save_model(tmp_path / name, llama_tensors(seed), shards=1 + seed) for seed, name in enumerate("ab")}


def test_a_model_stacked_on_itself_has_its_layers_twice_bit_by_bit(pair, tmp_path):
    recipe = stack(source(pair["b"], 0, 2), source(pair["b"], 0, 2))
    streammerge.merge(recipe, tmp_path / "out")
    whole, found = tensors_of(pair["b"]), tensors_of(tmp_path / "out")
    for number in range(4):
        torch.testing.assert_close(layer(found, number), layer(whole, number % 2), rtol=0, atol=0)
    around = {name: t for name, t in whole.items() if "layers" not in name}
    torch.testing.assert_close({n: found[n] for n in around}, around, rtol=0, atol=0)
    assert len(found) == len(whole) + len([name for name in whole if "layers" in name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([(0, 1), (1, 2), (0, 2)])), min_size=1, max_size=5)
)
def test_any_stack_is_made_of_the_layers_that_it_names(pair, tmp_path_factory, chosen):
    out = tmp_path_factory.mktemp("stacks") / "out"
    recipe = stack(*(source(pair[name], *ends) for name, ends in chosen))
    assert Recipe.load(Recipe.load(recipe).to_dict()) == Recipe.load(recipe)
    streammerge.merge(recipe, out)
    models, found = {name: tensors_of(folder) for name, folder in pair.items()}, tensors_of(out)
    layers = [(name, number) for name, ends in chosen for number in range(*ends)]
    for place, (name, number) in enumerate(layers):
        torch.testing.assert_close(layer(found, place), layer(models[name], number), rtol=0, atol=0)
    assert layer(found, len(layers)) == {}
    for name in ("model.embed_tokens.weight", "model.position_ids", *ABOVE):
        expected = models[chosen[-1 if name in ABOVE else 0][0]][name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


def test_a_stack_is_made_again_from_its_report_and_passes_verification(family, tmp_path):
    base, math, code = family["base"], family["math"], family["code"]
    parts = [source(base, 0, 2), source(math, 0, 2)], [source(code, 1, 2), source(base, 0, 1), source(math, 0, 1)]
    recipe = stack(*parts, method="ties", base_model=str(base), parameters={"density": [0.3, 0.9]})
    streammerge.merge(recipe, tmp_path / "out")
    streammerge.merge(tmp_path / "out" / "streammerge.json", tmp_path / "again")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    checked = streammerge.verify(tmp_path / "out", recompute=100)
    assert checked.problems == ()
    assert len(checked.recomputed) == len(tensors_of(tmp_path / "out"))


def test_each_slice_merges_its_own_experts_with_their_own_weights(family, tmp_path):
    base, math, code, chat = (tensors_of(family[name]) for name in ("base", "math", "code", "chat"))
    recipe = stack(
        [source(family["base"], 0, 2), source(family["math"], 0, 2, weight=[0.2, 0.6])],
        [
            source(family["code"], 0, 1),
            source(family["base"], 1, 2),
            source(family["chat"], 1, 2, weight=[{"filter": "layers.1.mlp", "value": 3.0}, {"value": -1.0}]),
        ],
        method="task_arithmetic",
        base_model=str(family["base"]),
        parameters={"weight": 0.5},
        out_dtype="float32",
    )
    streammerge.merge(recipe, tmp_path / "out")
    found = tensors_of(tmp_path / "out")

    def moved_by(bottom: Tensor, *moved: tuple[float, Tensor]) -> Tensor:
        total = bottom.double() + sum(weight * (each.double() - bottom.double()) for weight, each in moved)
        return total.float()

    for place, weight in enumerate((0.2, 0.6)):
        for rest, bottom in layer(base, place).items():
            expected = moved_by(bottom, (weight, layer(math, place)[rest]))
            torch.testing.assert_close(layer(found, place)[rest], expected)
    for rest, bottom in layer(base, 1).items():
        weight = 3.0 if rest.startswith("mlp") else -1.0
        expected = moved_by(bottom, (0.5, layer(code, 0)[rest]), (weight, layer(chat, 1)[rest]))
        torch.testing.assert_close(layer(found, 2)[rest], expected)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(found[name], moved_by(base[name], (0.2, math[name])))
    for name in ABOVE:
        torch.testing.assert_close(found[name], moved_by(base[name], (0.5, code[name]), (-1.0, chat[name])))


def test_an_interrupted_stack_goes_on_where_it_stopped(pair, tmp_path):
    recipe = stack(source(pair["a"], 0, 2), source(pair["b"], 1, 2), source(pair["a"], 0, 1))
    streammerge.merge(recipe, tmp_path / "whole")
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(recipe, tmp_path / "out", progress=stop, max_shard_size=20_000)
    other = stack(source(pair["a"], 0, 2), source(pair["b"], 0, 1), source(pair["a"], 0, 1))
    with pytest.raises(streammerge.StreamMergeError):
        streammerge.merge(other, tmp_path / "out", resume=True, max_shard_size=20_000)
    streammerge.merge(recipe, tmp_path / "out", resume=True, max_shard_size=20_000)
    torch.testing.assert_close(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ties", "tsv", "dare_linear"])
def test_a_device_gives_the_same_bytes_of_a_stack(family, method):
    base, math, code = (family[name] for name in ("base", "math", "code"))
    recipe = Recipe.from_dict(
        stack(
            [source(base, 0, 2), source(math, 0, 2), source(code, 0, 2)],
            [source(math, 1, 2), source(math, 0, 1), source(base, 1, 2)],
            [source(code, 0, 1), source(base, 0, 1)],
            method=method,
            base_model=str(base),
        )
    )
    storage = LocalStorage()
    found = []
    for device_bytes in (None, 1 << 30):
        plan = make_plan(recipe, storage, memory_bytes=1 << 30, device_memory_bytes=device_bytes)
        found.append(merged(plan, storage))  # type: ignore[arg-type]
    assert same_bytes(*found)


def test_a_method_that_looks_at_all_matrices_takes_the_same_models_in_every_slice(family):
    base, math, code = (family[name] for name in ("base", "math", "code"))
    slices = [source(base, 0, 2), source(math, 0, 2)], [source(base, 0, 2), source(code, 0, 2)]
    with pytest.raises(PlanError, match="`larv` looks at whole models"):
        streammerge.plan(stack(*map(list, slices), method="larv", base_model=str(base)))


def test_a_plan_says_which_layers_come_from_where(pair):
    planned = streammerge.plan(stack(source(pair["a"], 0, 2), [source(pair["b"], 1, 2)]))
    assert [step.name for step in planned.steps if "q_proj" in step.name] == [
        f"model.layers.{number}.self_attn.q_proj.weight" for number in range(3)
    ]
    assert planned.warnings == ()


def test_the_command_line_shows_the_stack(pair, tmp_path, capsys):
    recipe = stack(source(pair["a"], 0, 2), [source(pair["b"], 1, 2), source(pair["a"], 0, 1)], method="linear")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    cli.main(["plan", str(tmp_path / "recipe.json")], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["  layers    [0:2] of a[0:2]", "  layers    [2:3] of b[1:2], a[0:1]"]
    cli.main(["plan", str(tmp_path / "recipe.json"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["layers"] == ["[0:2] of a[0:2]", "[2:3] of b[1:2], a[0:1]"]


def test_the_base_of_a_slice_copies_what_a_rule_keeps(family, tmp_path):
    part = [source(family["math"], 0, 1), source(family["base"], 1, 2)]
    recipe = stack(part, method="ties", base_model=str(family["base"]), rules=[{"match": "mlp|norm", "keep": "base"}])
    streammerge.merge(recipe, tmp_path / "out")
    found, base = layer(tensors_of(tmp_path / "out"), 0), layer(tensors_of(family["base"]), 1)
    assert {name for name, tensor in base.items() if torch.equal(tensor, found[name])} == {
        name for name in base if "mlp" in name or "norm" in name
    }


# what does not fit together


def refused(recipe: object) -> tuple[str, str | None]:
    with pytest.raises(PlanError) as caught:
        streammerge.plan(recipe)  # type: ignore[arg-type]
    return caught.value.message, caught.value.hint


def test_a_look_at_whole_models_needs_the_same_models_in_every_slice(family):
    base, math, code = (family[name] for name in ("base", "math", "code"))

    def recipe(other: Path) -> dict[str, object]:
        parts = [[source(base, n, n + 1), source(each, n, n + 1)] for n, each in enumerate((math, other))]
        return stack(*parts, method="ties", base_model=str(base), parameters={"trim": "model", "density": 0.3})

    assert all(step.looks_at_model for step in streammerge.plan(recipe(math)).steps if step.method == "ties")
    message, hint = refused(recipe(code))
    assert message.startswith("`ties` looks at whole models, and those of `model.")
    assert hint == "Give every slice the same sources in the same order, or let it look at single tensors."


def test_layers_that_a_model_does_not_have_are_refused_with_the_recipes_line(pair, tmp_path):
    lines = ["merge_method: passthrough", "slices:"]
    for name, ends in (("a", "0, 2"), ("b", "1, 4")):
        lines.append(f"- sources: [{{model: {pair[name]}, layer_range: [{ends}]}}]")
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    assert refused(tmp_path / "recipe.yaml") == (
        f"{tmp_path / 'recipe.yaml'}:4: `layer_range: [1, 4]` goes beyond the 2 layers of `b`",
        "Its last layer is 1; `[0, 2]` takes all of them.",
    )


def test_a_model_of_another_width_is_refused(pair, tmp_path):
    def wide(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor], dim=-1) if tensor.ndim and tensor.is_floating_point() else tensor

    save_model(tmp_path / "wide", {name: wide(tensor) for name, tensor in llama_tensors(5).items()})
    message, hint = refused(stack(source(pair["a"], 0, 2), source(tmp_path / "wide", 0, 2), source(pair["b"], 0, 1)))
    assert message.startswith("the layers do not fit together: 8 differences\n  recipe.slices[1].sources[0]: `model.")
    assert "`model.layers.2.input_layernorm.weight` is [16] in `a[0:1]` but [32] in `wide[0:1]`" in message
    assert hint == (
        "Layers must come from models of one architecture and width. Names are those of the output; "
        "`key_map` under a source renames its tensors."
    )


def test_sources_of_a_slice_that_differ_are_refused(pair, tmp_path):
    tensors = llama_tensors(5)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_model(tmp_path / "lacking", tensors)
    message, _ = refused(stack([source(pair["a"], 0, 2), source(tmp_path / "lacking", 0, 2)], method="linear"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert message.endswith(f"`{name}` is in `a[0:2]` but not in `lacking[0:2]`")


def test_the_vocabularies_of_the_first_and_the_last_slice_must_agree(pair, tmp_path):
    tensors = llama_tensors(5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    save_model(tmp_path / "more", tensors)
    assert streammerge.plan(stack(source(pair["a"], 0, 1), source(tmp_path / "more", 0, 1), source(pair["a"], 1, 2)))
    message, _ = refused(stack(source(pair["a"], 0, 1), source(tmp_path / "more", 0, 1)))
    assert "`lm_head.weight` is [64, 16] in `a` but [66, 16] in `more`" in message


def renamed(tmp_path: Path, name: str, old: str, *new: str, **config: object) -> Path:
    """A model with the layers of another under other prefixes."""
    tensors = {}
    for key, tensor in llama_tensors().items():
        tensors |= {key.replace(old, each): tensor.clone() for each in new}
    folder = save_model(tmp_path / name, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def test_an_encoder_and_a_decoder_are_refused(tmp_path):
    folder = renamed(tmp_path, "t5", "model.layers.", "encoder.block.", "decoder.block.", is_encoder_decoder=True)
    assert refused(stack(source(folder, 0, 2)))[0] == (
        "`t5` has an encoder and a decoder, and `layer_range` does not say whose layers"
    )
    folder = renamed(tmp_path, "two", "model.layers.", "left.layers.", "right.layers.")
    assert refused(stack(source(folder, 0, 2))) == (
        "`two` has several stacks of layers, `left.layers.` (2), `right.layers.` (2), and slices take layers of one",
        "List the models under `models`, which merges all layers.",
    )


def test_layers_of_a_vision_language_model_are_those_of_its_language_model(tmp_path):
    folder = renamed(
        tmp_path, "vlm", "model.layers.", "model.language_model.layers.", "model.visual.blocks.",
        text_config={"num_hidden_layers": LAYERS, "layer_types": ["a", "b"]},
        vision_config={"num_hidden_layers": LAYERS},
    )  # fmt: skip
    streammerge.merge(stack(source(folder, 0, 2), source(folder, 1, 2)), tmp_path / "out")
    whole, found = tensors_of(folder), tensors_of(tmp_path / "out")
    seen = {name for name in whole if "visual" in name}
    assert seen == {name for name in found if "visual" in name}
    assert {name for name in found if ".layers.2." in name} == {
        name.replace(".1.", ".2.") for name in whole if "model.layers.1." in name
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"] == {"num_hidden_layers": 3, "layer_types": ["a", "b", "b"]}
    assert config["vision_config"] == {"num_hidden_layers": LAYERS}


@pytest.mark.parametrize(
    ("name", "above"),
    [
        ("model.norm.weight", True),
        ("model.language_model.norm.weight", True),
        ("lm_head.weight", True),
        ("transformer.ln_f.bias", True),
        ("gpt_neox.final_layer_norm.weight", True),
        ("embed_out.weight", True),
        ("model.embedding_norm.weight", True),
        ("score.weight", True),
        ("model.embed_tokens.weight", False),
        ("transformer.wte.weight", False),
        ("model.embeddings.norm.weight", False),
        ("transformer.word_embeddings_layernorm.weight", False),
        ("model.visual.merger.norm.weight", False),
        ("model.multi_modal_projector.norm.weight", False),
    ],
)
def test_final_norms_and_heads_lie_above_the_layers(name, above):
    assert is_above(name) is above


# config.json


def config_of(chosen: list[tuple[int, int, int]], *configs: Mapping[str, object], layers: int = 4) -> dict[str, object]:
    return stacked_config(*prepared(chosen, *configs, layers=layers))


def prepared(chosen: list[tuple[int, int, int]], *configs: Mapping[str, object], layers: int = 4) -> tuple:
    models = [
        Checkpoint(location=str(n), tensors=headers(layers), config=config, files={}, header_sha256={})
        for n, config in enumerate(configs)
    ]
    recipe = Recipe.from_dict(stack(*(source(model, first, end) for model, first, end in chosen)))
    # in the order in which the recipe names them
    order = [int(expert.location) for expert in recipe.experts]
    return recipe, [models[n] for n in order], [str(n) for n in order]


def headers(layers: int) -> dict:
    names = [f"model.layers.{number}.weight" for number in range(layers)]
    return {name: TensorEntry(name, "F32", (1,), "f", 4 * n, 4) for n, name in enumerate(names)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"num_hidden_layers": 4}, {"num_hidden_layers": 5}),
        ({"n_layer": 4, "hidden_size": 4}, {"n_layer": 5, "hidden_size": 4}),
        ({"layer_types": ["w", "x", "y", "z"]}, {"layer_types": ["w", "x", "y", "y", "z"]}),
        ({"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 1, 1, 1, 0]}),
        ({"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [0, 2, 3]}),
        ({"attn_layer_indices": [3]}, {"attn_layer_indices": [4]}),
        ({"moe_layers": [0, 1, 2, 3]}, {"moe_layers": [0, 1, 2, 3, 4]}),
        ({"hybrid_override_pattern": "M-E*"}, {"hybrid_override_pattern": "M-EE*"}),
        ({"num_kv_heads": [1, 2, 3, 4]}, {"num_kv_heads": [1, 2, 3, 3, 4]}),
        (
            {"attention_layers": ["g", "l", "g", "l"], "attention_types": [[["g", "l"], 2]]},
            {"attention_layers": ["g", "l", "g", "g", "l"], "attention_types": [[["g", "l", "g", "g", "l"], 1]]},
        ),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": 3},
            {
                "model_type": "gemma3_text",
                "sliding_window_pattern": 3,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2 + ["sliding_attention"],
            },
        ),
        ({"text_config": {"num_hidden_layers": 4}}, {"text_config": {"num_hidden_layers": 5}}),
        ({"vision_config": {"num_hidden_layers": 4}},) * 2,
        ({"codec_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}},) * 2,
        # lists as long as there are layers that do not speak of layers
        ({"eos_token_id": [5, 6, 7, 8], "architectures": ["A", "B", "C", "D"]},) * 2,
        ({"rope_scaling": {"short_factor": [1.0, 1.0, 1.0, 1.0]}},) * 2,
    ],
)
def test_what_config_json_says_of_layers_follows_them(before, after):
    assert config_of([(0, 0, 3), (0, 2, 4)], before) == after


def test_a_layers_item_is_that_of_the_model_it_comes_from():
    first, second = {"layer_types": ["a", "b", "c", "d"]}, {"layer_types": ["e", "f", "g", "h"]}
    assert config_of([(0, 0, 2), (1, 1, 3)], first, second) == {"layer_types": ["a", "b", "f", "g"]}
    with pytest.raises(PlanError, match="says `layer_types` of each layer, that of `1` not of its layer 2, which"):
        config_of([(0, 0, 2), (1, 1, 3)], first, {})


config_keys = st.sampled_from([
    "num_hidden_layers", "n_layer", "layer_types", "mlp_only_layers", "hybrid_override_pattern", "attention_types",
    "attention_layers", "sliding_window_pattern", "text_config", "vision_config", "model_type", "eos_token_id",
])  # fmt: skip
config_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 5) | st.sampled_from(["gemma2", "MM-*", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(config_keys, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    st.dictionaries(config_keys, config_values, max_size=6),
    st.dictionaries(config_keys, config_values, max_size=6),
    st.booleans(),
)
def test_whatever_a_config_holds_all_else_is_kept_and_nothing_breaks(first, second, both):
    chosen = [(0, 0, 3), (1, 2, 4)] if both else [(0, 0, 3), (0, 2, 4)]
    try:
        found = config_of(chosen, first, second)
    except PlanError:
        # a list that ends before a layer that is taken
        return
    assert json.loads(json.dumps(found)) == found
    for key in ("vision_config", "model_type", "eos_token_id"):
        assert (key in found) == (key in first)
        # a mapping is taken for a config, unless it is of another part
        assert found.get(key) == first.get(key) or (isinstance(first[key], dict) and key != "vision_config")


def test_numbers_that_pick_layers_by_their_place_are_warned_of():
    moved, same = [(0, 0, 3), (0, 2, 4)], [(0, 0, 3)]
    config = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "max_window_layers": 0}
    (warning,) = config_warnings(*prepared(moved, config))
    assert warning.startswith("config.json keeps `first_k_dense_replace: 1` although layers change places")
    assert config_warnings(*prepared(same, config)) == []
    assert config_warnings(*prepared(moved, {"num_hidden_layers": 4, "sliding_window_pattern": 2})) == []
    (warning,) = config_warnings(*prepared(moved, {"hidden_size": 4}))
    assert warning == "config.json does not say that there are 4 layers: say there that the output has 5"


def test_layers_of_several_kinds_that_change_places_are_warned_of(pair, tmp_path):
    tensors = llama_tensors(5)
    tensors["model.layers.0.mlp.gate.weight"] = torch.ones(4, 16, dtype=torch.bfloat16)
    mixed = save_model(tmp_path / "mixed", tensors)
    assert streammerge.plan(stack(source(mixed, 0, 1), source(mixed, 1, 2))).warnings == ()
    (warning,) = streammerge.plan(stack(source(mixed, 0, 2), source(mixed, 0, 1))).warnings
    assert warning.startswith("layers of 2 kinds, such as dense and sparse ones, change places: 1 lie where `mixed`")


# transformers


def test_a_stack_of_a_llamas_layers_loads_and_generates(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    recipe = stack(source(tmp_path / "a", 0, 2), source(tmp_path / "b", 1, 3), source(tmp_path / "a", 2, 3))
    streammerge.merge(recipe, tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    b = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(model.model.layers[3].state_dict(), b.model.layers[2].state_dict(), rtol=0, atol=0)
    written = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 7)
