"""What models store differently and mean alike: tied heads, and buffers that are computed at load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammerge
from streammerge.alike import made_alike
from streammerge.checkpoint import Checkpoint, FileFacts, TensorEntry
from streammerge.errors import PlanError
from streammerge.rules import TensorClass, is_made_at_load, role_by_name
from tests.models import CONFIG, llama_tensors, recipe_of, save_model, tuned
from tests.stored import tensors_of

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def model(location: str, config: Mapping[str, Any], *names: str, same: tuple[str, str] | None = None) -> Checkpoint:
    """A model of tensors [4, 2] side by side in one file; of `same`, the first has the very bytes of the second."""
    tensors = {n: TensorEntry(n, "F32", (4, 2), "model.safetensors", 32 * i, 32) for i, n in enumerate(names)}
    if same:
        tensors[same[0]] = replace(tensors[same[1]], name=same[0])
    return Checkpoint(
        location=location,
        tensors=tensors,
        config=config,
        header_sha256={},
        files={"model.safetensors": FileFacts(0, 0)},
    )


def alike(*models: Checkpoint) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    return made_alike(models, [each.location for each in models])


def refused(*models: Checkpoint) -> str:
    with pytest.raises(PlanError) as raised:
        alike(*models)
    assert raised.value.hint
    return raised.value.message


# heads


@pytest.mark.parametrize("tied_first", [True, False])
def test_a_tied_head_is_the_embedding_beside_a_model_with_a_head_of_its_own(tied_first):
    tied, own = model("tied", TIED, EMBEDDING), model("own", UNTIED, EMBEDDING, HEAD)
    found, notes = alike(*((tied, own) if tied_first else (own, tied)))
    by_name = {each.location: each for each in found}
    assert by_name["tied"].tensors[HEAD] == replace(tied.tensors[EMBEDDING], name=HEAD)
    assert by_name["own"].tensors == own.tensors
    assert [each.config for each in found] == [UNTIED, UNTIED]
    assert notes == (
        "`tied` ties its head to its embedding and `own` does not: "
        "the output has `lm_head.weight`, and `tie_word_embeddings: false`",
    )


def test_models_that_agree_are_left_as_they_are():
    for config, names in (
        (TIED, (EMBEDDING,)),
        (UNTIED, (EMBEDDING, HEAD)),
        (TIED, (EMBEDDING, HEAD)),
        ({}, (EMBEDDING,)),
    ):
        pair = model("a", config, *names), model("b", config, *names)
        assert alike(*pair) == (pair, ())


def test_a_head_that_is_stored_as_its_embeddings_bytes_is_left_out_where_all_are_tied():
    pickled, plain = model("a", TIED, EMBEDDING, same=(HEAD, EMBEDDING)), model("b", TIED, EMBEDDING)
    found, notes = alike(pickled, plain)
    assert [list(each.tensors) for each in found] == [[EMBEDDING], [EMBEDDING]]
    assert [each.config for each in found] == [TIED, TIED]
    assert notes == ()


def test_a_head_stored_as_its_embeddings_bytes_is_a_head_beside_one_of_its_own():
    pickled = model("a", TIED, EMBEDDING, same=(HEAD, EMBEDDING))
    found, _ = alike(pickled, model("b", UNTIED, EMBEDDING, HEAD), model("c", TIED, EMBEDDING))
    assert all(HEAD in each.tensors for each in found)
    assert [each.config for each in found] == [UNTIED] * 3


def test_a_model_with_a_head_needs_not_say_that_it_is_untied():
    found, _ = alike(model("a", {"model_type": "llama"}, EMBEDDING, HEAD), model("b", TIED, EMBEDDING))
    assert found[0].config == {"model_type": "llama", "tie_word_embeddings": False}


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "opt"])
def test_architectures_that_tie_unless_told_need_not_say_so(kind):
    found, _ = alike(
        model("a", {"model_type": kind, **UNTIED}, EMBEDDING, HEAD), model("b", {"model_type": kind}, EMBEDDING)
    )
    assert HEAD in found[1].tensors


def test_the_text_models_config_may_say_it():
    nested = {"text_config": {**TIED, "hidden_size": 2}}
    embedding = "model.language_model.embed_tokens.weight"
    found, _ = alike(model("a", nested, embedding), model("b", UNTIED, embedding, HEAD))
    assert found[0].config == {"text_config": {**UNTIED, "hidden_size": 2}, **UNTIED}


@pytest.mark.parametrize(
    ("config", "stored", "says"),
    [
        ({}, False, "`a` does not say"),
        ({"model_type": "llama"}, False, "`a` does not say"),
        ({"tie_word_embeddings": None}, False, "`a` does not say"),
        (UNTIED, False, "`a` says false"),
        (TIED, True, "`a` says true"),
        ({"model_type": "gpt2"}, True, "`a` says true"),
    ],
)
def test_a_config_that_leaves_open_what_the_head_is_is_refused(config, stored, says):
    odd = model("a", config, EMBEDDING, *([HEAD] if stored else []))
    other = model("b", TIED, EMBEDDING) if stored else model("b", UNTIED, EMBEDDING, HEAD)
    message = refused(odd, other)
    assert message.startswith("`lm_head.weight` is in `")
    assert message.endswith(f"and the config.json of {says} to `tie_word_embeddings`")


def test_a_tied_head_that_works_on_scaled_inputs_is_no_head():
    tied, own = model("a", TIED, "shared.weight"), model("b", UNTIED, "shared.weight", HEAD)
    assert refused(tied, own) == "`lm_head.weight` is in `b`, but `a` ties it to its embedding"


def test_twins_are_told_once_or_by_all():
    names = "shared.weight", "encoder.embed_tokens.weight"
    whole, pickled = model("a", TIED, names[0]), model("b", TIED, names[0], same=(names[1], names[0]))
    assert [list(each.tensors) for each in alike(whole, pickled)[0]] == [[names[0]]] * 2
    two = model("c", TIED, *names)
    found, _ = alike(whole, two)
    assert found[0].tensors[names[1]] == replace(whole.tensors[names[0]], name=names[1])
    assert alike(two, two)[0] == (two, two)


def saved(folder: Path, tensors: Mapping[str, Tensor], *, tied: bool, shards: int = 1) -> Path:
    kept = {name: tensor for name, tensor in tensors.items() if not (tied and name == HEAD)}
    save_model(folder, kept, shards=shards)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied}))
    return folder


@pytest.mark.parametrize("method", ["linear", "actmat", "ties"])
@pytest.mark.parametrize("tied", [("base",), ("math",), ("math", "code")], ids=str)
def test_a_merge_with_tied_models_is_that_of_their_untied_twins(method, tied, tmp_path):
    base = llama_tensors()
    models = {"base": base, "math": tuned(base, 1), "code": tuned(base, 2)}
    folders, twins = {}, {}
    for name, tensors in models.items():
        if name in tied:
            tensors[HEAD] = tensors[EMBEDDING].clone()
        folders[name] = saved(tmp_path / name, tensors, tied=name in tied, shards=2)
        twins[name] = saved(tmp_path / "twins" / name, tensors, tied=False)
    report = streammerge.merge(recipe_of(folders, method), tmp_path / "out")
    streammerge.merge(recipe_of(twins, method), tmp_path / "expected")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert report is not None
    assert streammerge.verify(tmp_path / "out", inputs=True, recompute=4).problems == ()


def test_pickled_and_other_tied_models_merge_to_a_tied_one(tmp_path):
    base = llama_tensors()
    folders = {}
    for number, name in enumerate(("base", "math")):
        tensors = tuned(base, number)
        folders[name] = saved(tmp_path / name, tensors, tied=True)
        if name == "math":
            (folders[name] / "model.safetensors").unlink()
            torch.save({**tensors, HEAD: tensors[EMBEDDING]}, folders[name] / "pytorch_model.bin")
    streammerge.merge(recipe_of(folders, "linear"), tmp_path / "out")
    assert HEAD not in tensors_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


# buffers


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
        ("model.rotary_emb.inv_freq", (8,)),
        ("gpt_neox.layers.3.attention.masked_bias", ()),
        ("h.0.attn.masked_bias", (1,)),
        ("transformer.h.11.attn.bias", (1, 1, 16, 16)),
        ("bert.embeddings.position_ids", (1, 512)),
        ("vision_model.embeddings.position_ids", (1, 50)),
    ],
)
def test_buffers_that_are_computed_at_load_are_known(name, shape):
    assert is_made_at_load(name, shape)
    role = role_by_name(name, shape, "F32", {})
    assert role is None or role.kind is TensorClass.BUFFER


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h.0.attn.bias", (16,)),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,)),
        ("model.embeddings.position_embeddings.weight", (16, 4)),
        ("xrotary_emb.inv_freq", (8,)),
        ("layers.0.attention.bias", (4, 4)),
    ],
)
def test_what_training_moves_is_no_such_buffer(name, shape):
    assert not is_made_at_load(name, shape)


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def with_buffer(tensors: Mapping[str, Tensor], value: float) -> dict[str, Tensor]:
    return {**tensors, FREQUENCIES: torch.full((8,), value)}


def test_a_buffer_that_some_experts_lack_is_the_bases(tmp_path):
    base = llama_tensors()
    folders = {
        "base": save_model(tmp_path / "base", with_buffer(base, 1 / 3)),
        "math": save_model(tmp_path / "math", tuned(base, 1)),
        "code": save_model(tmp_path / "code", with_buffer(tuned(base, 2), 7.0)),
    }
    recipe = recipe_of(folders, "linear")
    planned = streammerge.plan(recipe)
    assert any("1 buffer(s) such as `" + FREQUENCIES in line and "are copied" in line for line in planned.warnings)
    streammerge.merge(recipe, tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[FREQUENCIES], torch.full((8,), 1 / 3))
    assert streammerge.verify(tmp_path / "out", inputs=True, recompute=3).problems == ()


def test_a_buffer_that_the_base_lacks_is_left_out_with_a_warning(tmp_path):
    base = llama_tensors()
    folders = {
        "base": save_model(tmp_path / "base", base),
        "math": save_model(tmp_path / "math", with_buffer(tuned(base, 1), 1.0)),
    }
    planned = streammerge.plan(recipe_of(folders, "linear"))
    assert any("1 buffer(s)" in line and "they are left out" in line for line in planned.warnings)
    streammerge.merge(recipe_of(folders, "linear"), tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == base.keys()


def test_buffers_of_other_shapes_are_still_a_difference(tmp_path):
    base = llama_tensors()
    folders = {
        "base": save_model(tmp_path / "base", with_buffer(base, 1.0)),
        "math": save_model(tmp_path / "math", {**base, FREQUENCIES: torch.ones(4)}),
    }
    with pytest.raises(PlanError, match="the models do not fit together: 1 difference"):
        streammerge.plan(recipe_of(folders, "linear"))


def test_any_other_tensor_on_one_side_only_is_a_difference(tmp_path):
    base = llama_tensors()
    folders = {
        "base": save_model(tmp_path / "base", base),
        "math": save_model(tmp_path / "math", {**base, "model.layers.0.self_attn.q_proj.bias": torch.ones(16)}),
    }
    with pytest.raises(PlanError, match=r"q_proj\.bias` is in `.*math` but not in"):
        streammerge.plan(recipe_of(folders, "linear"))
