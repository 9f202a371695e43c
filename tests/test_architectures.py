"""Whole models of many architectures, as transformers saves them: merged, loaded again and run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import streammerge
from streammerge.rules import TensorClass
from tests.models import recipe_of
from tests.stored import tensors_of

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
PICTURE = {**ENCODER, "image_size": 16, "patch_size": 8}
TEXT = torch.arange(3, 15).view(1, 12)
IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
# a picture of 16 x 16 in patches of 8 has four
IMAGE_TOKEN = 95
WITH_IMAGE = torch.tensor([[1, *[IMAGE_TOKEN] * 4, 5, 6, 7]])


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, the settings of a tiny one, and what to run it on.

    transposed  how many of its matrices are stored [in, out]
    """

    name: str
    model_type: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Tensor] = field(default_factory=lambda: {"input_ids": TEXT})
    transposed: int = 0

    def build(self, seed: int) -> Any:
        """One with weights of its own."""
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(self.model_type, **self.settings)
        return getattr(transformers, self.name)(config).eval()


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "llama", DECODER),
    Architecture("LlamaForCausalLM", "llama", {**DECODER, "tie_word_embeddings": True}),
    Architecture("Olmo3ForCausalLM", "olmo3", DECODER),
    Architecture("Qwen3ForCausalLM", "qwen3", {**DECODER, "head_dim": 8}),
    Architecture("Gemma3ForCausalLM", "gemma3_text", {**DECODER, "head_dim": 8}),
    Architecture("Phi3ForCausalLM", "phi3", DECODER),
    Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "eos_token_id": 2},
        transposed=8,
    ),
    Architecture(
        "T5ForConditionalGeneration",
        "t5",
        {"vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
        {"input_ids": TEXT, "decoder_input_ids": TEXT},
    ),
    Architecture("BertForMaskedLM", "bert", ENCODER),
    Architecture("RobertaForMaskedLM", "roberta", ENCODER),
    Architecture("CLIPModel", "clip", {"projection_dim": 20, "text_config": ENCODER, "vision_config": PICTURE},
                 {"input_ids": TEXT, "pixel_values": IMAGE}),
    Architecture("ViTForImageClassification", "vit", PICTURE, {"pixel_values": IMAGE}),
    Architecture(
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": {"model_type": "llama", **DECODER},
            "vision_config": {"model_type": "clip_vision_model", **PICTURE},
            "image_token_index": IMAGE_TOKEN,
            "image_token_id": IMAGE_TOKEN,
        },
        {"input_ids": WITH_IMAGE, "pixel_values": IMAGE},
    ),
    Architecture(
        "PaliGemmaForConditionalGeneration",
        "paligemma",
        {
            "text_config": {"model_type": "gemma", **DECODER, "head_dim": 8},
            "vision_config": {"model_type": "siglip_vision_model", **PICTURE, "projection_dim": 32},
            "projection_dim": 32,
            "image_token_index": IMAGE_TOKEN,
            "image_token_id": IMAGE_TOKEN,
        },
        {"input_ids": WITH_IMAGE, "pixel_values": IMAGE},
    ),
    Architecture(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {
            "text_config": {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
            "image_token_id": IMAGE_TOKEN,
        },
    ),
)  # fmt: skip
NAMES = [f"{each.name}{' tied' if each.settings.get('tie_word_embeddings') else ''}" for each in ARCHITECTURES]


def tuned(model: Any, seed: int) -> Any:
    """The model after a little training: every parameter moved, tied ones together."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def outputs(model: Any, architecture: Architecture) -> Tensor:
    with torch.no_grad():
        found = model(**architecture.inputs)
    return found["logits_per_image" if architecture.name == "CLIPModel" else "logits"]


def loaded(architecture: Architecture, folder: Path) -> Any:
    """The folder's model, none of whose tensors is missing, unknown or of another shape."""
    model, found = getattr(transformers, architecture.name).from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), found
    return model.eval()


@pytest.fixture(params=ARCHITECTURES, ids=NAMES)
def architecture(request) -> Architecture:
    return request.param


@pytest.fixture
def saved(architecture, tmp_path) -> Callable[[str, int | None], Path]:
    """Saves the base, or an expert of it by its seed."""

    def save(name: str, seed: int | None = None) -> Path:
        model = architecture.build(0)
        (model if seed is None else tuned(model, seed)).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", ["actmat", "ties"])
def test_a_merge_of_two_is_a_whole_model_that_runs(architecture, saved, method, tmp_path):
    folders = {"base": saved("base"), "one": saved("one", 1), "two": saved("two", 2)}
    streammerge.merge(recipe_of(folders, method), tmp_path / "out")
    merged = outputs(loaded(architecture, tmp_path / "out"), architecture)
    assert torch.isfinite(merged).all()
    others = [outputs(loaded(architecture, folder), architecture) for folder in folders.values()]
    assert not any(torch.equal(merged, other) for other in others)
    assert merged.shape == others[0].shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("method", "parameters"), [("actmat", {}), ("ties", {"density": 1.0})])
def test_a_merge_of_one_expert_is_that_expert(architecture, saved, method, parameters, tmp_path):
    folders = {"base": saved("base"), "one": saved("one", 1)}
    streammerge.merge(recipe_of(folders, method, parameters=parameters), tmp_path / "out")
    expected, found = tensors_of(folders["one"]), tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(
        outputs(loaded(architecture, tmp_path / "out"), architecture),
        outputs(loaded(architecture, folders["one"]), architecture),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_no_tensor_is_classed_by_its_shape_alone(architecture, saved):
    planned = streammerge.plan(recipe_of({"base": saved("base"), "one": saved("one", 1)}, "actmat"))
    assert [step.name for step in planned.steps if step.role.source == "shape"] == []
    assert sum(step.role.transposed for step in planned.steps) == architecture.transposed
    matrices = [step for step in planned.steps if step.by_matrix]
    assert len(matrices) >= 8
    assert all(step.role.kind in (TensorClass.MATRIX, TensorClass.ROUTER) for step in matrices)


def test_an_expert_saved_tied_and_one_untied_merge_to_a_model_that_loads(tmp_path):
    architecture, tied = ARCHITECTURES[0], ARCHITECTURES[1]
    architecture.build(0).save_pretrained(tmp_path / "base")
    tuned(tied.build(0), 1).save_pretrained(tmp_path / "one")
    tuned(architecture.build(0), 2).save_pretrained(tmp_path / "two")
    folders = {name: tmp_path / name for name in ("base", "one", "two")}
    streammerge.merge(recipe_of(folders, "linear"), tmp_path / "out")
    model = loaded(architecture, tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    one, two = (loaded(architecture, folders[name]) for name in ("one", "two"))
    expected = (one.model.embed_tokens.weight.double() + two.lm_head.weight.double()) / 2
    torch.testing.assert_close(model.lm_head.weight.double(), expected, rtol=0, atol=1e-7)


def test_an_architectures_pickled_models_merge_as_its_safetensors_do(tmp_path):
    architecture = ARCHITECTURES[1]
    folders, twins = {}, {}
    for number, name in enumerate(("base", "one", "two")):
        model = tuned(architecture.build(0), number)
        folders[name], twins[name] = tmp_path / name, tmp_path / "twins" / name
        model.save_pretrained(folders[name])
        twins[name].mkdir(parents=True)
        (twins[name] / "config.json").write_text((folders[name] / "config.json").read_text())
        # as `save_pretrained` wrote it before safetensors: the head too, which is the embedding
        torch.save(model.state_dict(), twins[name] / "pytorch_model.bin")
    for family, out in ((folders, "expected"), (twins, "found")):
        streammerge.merge(recipe_of(family, "actmat"), tmp_path / out)
    expected, found = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "found")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert json.loads((tmp_path / "found" / "config.json").read_text())["tie_word_embeddings"] is True
