"""Models that do not fit, of every kind: refused by the plan with a hint, and by the merge before a byte is written."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streammerge
from streammerge.errors import CheckpointError, PlanError, RecipeError, StreamMergeError
from tests import vocabularies
from tests.adapters import factors, save_adapter
from tests.models import CONFIG, llama_tensors, save_model, tuned

Recipe = dict[str, object]
Says = Callable[[Path], Recipe]
CASES: dict[str, tuple[Says, type[StreamMergeError], str]] = {}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def refused(error: type[StreamMergeError], message: str) -> Callable[[Says], Says]:
    """A recipe that cannot be merged, and what is said of it."""

    def added(says: Says) -> Says:
        CASES[says.__name__] = (says, error, message)
        return says

    return added


def recipe(*models: object, method: str = "linear", **more: object) -> Recipe:
    listed = [model if isinstance(model, dict) else {"model": str(model)} for model in models]
    return {"merge_method": method, "models": listed, **more}


def model(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """A model's folder with these tensors, and a config that says so."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def base(root: Path) -> Path:
    return save_model(root / "base", llama_tensors())


def expert(root: Path) -> Path:
    return save_model(root / "expert", tuned(llama_tensors(), 1))


def adapter(root: Path, tensors: Mapping[str, Tensor] | None = None, **config: object) -> Path:
    return save_adapter(root / "adapter", tensors or factors(llama_tensors(), {Q_PROJ: 4}), **config)


def mixture(folder: Path, experts: int, *, stacked: bool, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Mixtral-like layer beside Llama's."""
    own = llama_tensors()
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        own = {name: t for name, t in own.items() if not name.startswith(f"{prefix}mlp.")}
        own[f"{prefix}mlp.gate.weight"] = torch.ones(experts, 16, dtype=torch.bfloat16)
        if stacked:
            own[f"{prefix}mlp.experts.gate_up_proj"] = torch.ones(experts, 48, 16).to(dtype)
            own[f"{prefix}mlp.experts.down_proj"] = torch.ones(experts, 16, 24).to(dtype)
            continue
        for number in range(experts):
            for name, shape in {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}.items():
                own[f"{prefix}mlp.experts.{number}.{name}_proj.weight"] = torch.ones(shape).to(dtype)
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": experts}
    return model(folder, own, **config)


def gpt2(folder: Path, *, as_linear: bool) -> Path:
    shapes = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}
    tensors = {"transformer.wte.weight": torch.ones(64, 16)}
    for name, shape in shapes.items():
        tensors[f"transformer.h.0.{name}.weight"] = torch.ones(shape[::-1] if as_linear else shape)
    return model(folder, tensors, model_type="gpt2", architectures=["GPT2LMHeadModel"])


# adapters


@refused(
    CheckpointError, "`model.layers.0.self_attn.q_proj` has A [4, 16] and B [32, 4], the base's weight is [16, 16]"
)
def an_adapter_of_a_base_with_other_shapes(root):
    wide = {name: t.repeat(2, 1) if name == f"{Q_PROJ}.weight" else t for name, t in llama_tensors().items()}
    found = adapter(root, factors(wide, {Q_PROJ: 4}))
    return recipe(found, base_model=str(base(root)))


@refused(CheckpointError, "another rank")
def factors_of_two_ranks(root):
    found = factors(llama_tensors(), {Q_PROJ: 4})
    name = f"base_model.model.{Q_PROJ}.lora_A.weight"
    return recipe(adapter(root, {**found, name: found[name][:3]}), base_model=str(base(root)))


@refused(CheckpointError, "`model.layers.7.self_attn.q_proj`: no such tensor in the base")
def an_adapter_of_a_module_that_the_base_has_not(root):
    found = factors(llama_tensors(), {Q_PROJ: 4})
    moved = {name.replace("layers.0", "layers.7"): t for name, t in found.items()}
    return recipe(adapter(root, moved), base_model=str(base(root)))


@refused(CheckpointError, "is an adapter, and its config names no base")
def an_adapter_alone_whose_base_is_not_known(root):
    return recipe(adapter(root), expert(root))


@refused(CheckpointError, "its weights are pickled")
def an_adapter_with_pickled_weights(root):
    found = adapter(root)
    (found / "adapter_model.safetensors").rename(found / "adapter_model.bin")
    return recipe(found, base_model=str(base(root)))


# mixtures of experts


@refused(PlanError, "the models do not fit together")
def mixtures_of_other_numbers_of_experts(root):
    return recipe(mixture(root / "a", 4, stacked=False), mixture(root / "b", 6, stacked=False))


@refused(PlanError, "the models do not fit together")
def stacked_experts_of_another_number(root):
    return recipe(mixture(root / "a", 4, stacked=True), mixture(root / "b", 6, stacked=True))


@refused(PlanError, "the models do not fit together")
def stacked_experts_beside_another_number_of_single_ones(root):
    return recipe(mixture(root / "a", 4, stacked=False), mixture(root / "b", 6, stacked=True))


@refused(PlanError, "`model.layers.0.mlp.experts.down_proj` is I8, and a layer's weights are floats")
def experts_of_integers(root):
    return recipe(*(mixture(root / name, 4, stacked=True, dtype=torch.int8) for name in "ab"))


@refused(PlanError, "`model.layers.0.mlp.experts.0.down_proj.weight` is BF16 in `a` but I8 in `b`")
def experts_of_integers_beside_floats(root):
    kinds = {"a": torch.bfloat16, "b": torch.int8}
    return recipe(*(mixture(root / name, 4, stacked=False, dtype=dtype) for name, dtype in kinds.items()))


@refused(PlanError, "is F8_E8M0, which needs its scales")
def experts_of_packed_bits(root):
    one, two = (mixture(root / name, 4, stacked=True) for name in "ab")
    for folder in (one, two):
        edit_header(folder, "mlp.experts", "F8_E8M0")
    return recipe(one, two)


def edit_header(folder: Path, part: str, dtype: str) -> None:
    """Say that some tensors are of another dtype of half as many bytes."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if part in name:
            entry["dtype"], entry["shape"] = dtype, [*entry["shape"][:-1], 2 * entry["shape"][-1]]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


# 8-bit floats


def in_8_bits(folder: Path, scales: Mapping[str, Tensor], **quantization: object) -> Path:
    tensors = llama_tensors()
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"].to(torch.float8_e4m3fn)
    table = {"quant_method": "fp8", "weight_block_size": [8, 8], **quantization}
    return model(folder, {**tensors, **scales}, **({"quantization_config": table} if quantization else {}))


@refused(PlanError, "which needs its scales to be merged")
def codes_of_8_bits_without_scales(root):
    return recipe(in_8_bits(root / "a", {}), in_8_bits(root / "b", {}))


@refused(CheckpointError, "weight_scale_inv")
def codes_whose_scale_is_missing(root):
    return recipe(in_8_bits(root / "a", {}, fmt="e4m3"), expert(root))


@refused(CheckpointError, "weight_scale_inv")
def codes_whose_scales_are_of_other_blocks(root):
    scales = {f"{Q_PROJ}.weight_scale_inv": torch.ones(2, 3)}
    return recipe(in_8_bits(root / "a", scales, fmt="e4m3"), expert(root))


@refused(PlanError, "is quantised by `gptq`")
def weights_that_another_tool_quantised(root):
    return recipe(model(root / "a", llama_tensors(), quantization_config={"quant_method": "gptq"}), expert(root))


# pickles


@refused(CheckpointError, "its pickle asks for `pathlib.PosixPath`, which was not run")
def a_pickle_of_a_class_of_its_own(root):
    folder = root / "a"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"model.norm.weight": Path("/tmp")}))
        archive.writestr("a/version", "3\n")
    return recipe(folder, expert(root))


@refused(CheckpointError, "is no tensor")
def a_pickle_of_numbers(root):
    folder = root / "a"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"model.norm.weight": 3}, folder / "pytorch_model.bin")
    return recipe(folder, expert(root))


# names, layouts, heads


@refused(PlanError, "the models do not fit together")
def a_transposed_gpt2_beside_one_that_is_not(root):
    return recipe(gpt2(root / "a", as_linear=False), gpt2(root / "b", as_linear=True))


@refused(PlanError, "`lm_head.weight`")
def a_head_that_one_model_lacks_and_does_not_tie(root):
    headless = {name: t for name, t in llama_tensors().items() if name != "lm_head.weight"}
    return recipe(expert(root), model(root / "a", headless))


@refused(PlanError, "the models do not fit together")
def a_tower_that_one_model_lacks(root):
    both = {f"language_model.{name}": t for name, t in llama_tensors().items()}
    tower = {f"vision_tower.{name}": t for name, t in llama_tensors(3).items()}
    return recipe(model(root / "a", {**both, **tower}), model(root / "b", both))


@refused(PlanError, "`key_map` makes")
def a_map_that_makes_one_name_of_two(root):
    mapped = {"model": str(expert(root)), "key_map": {r"layers\.\d": "layers.0"}}
    return recipe(base(root), mapped)


@refused(PlanError, "the models do not fit together")
def a_map_that_leaves_tensors_without_a_match(root):
    renamed = {f"wrapped.{n}" if "mlp" in n else n: t for n, t in llama_tensors().items()}
    mapped = {"model": str(model(root / "a", renamed)), "key_map": {"wrapped": "elsewhere"}}
    return recipe(base(root), mapped)


# vocabularies


def sized(root: Path, **more: object) -> Recipe:
    for number, (name, added) in enumerate({"base": (), "one": ("<x>",), "two": ("<y>", "<z>")}.items()):
        vocabularies.save(root / name, number, added)
    return recipe(root / "one", root / "two", base_model=str(root / "base"), **more)


@refused(PlanError, "the models do not fit together")
def vocabularies_of_other_sizes(root):
    return sized(root)


@refused(PlanError, "`tokenizer_source: base` finds no tokenizer")
def a_vocabulary_of_a_model_that_has_none(root):
    found = sized(root, tokenizer_source="base")
    for file in (root / "base").glob("*token*"):
        file.unlink()
    return found


@refused(RecipeError, "recipe.tokenizer_source: ")
def a_vocabulary_of_a_model_that_is_not_merged(root):
    return sized(root, tokenizer_source="elsewhere")


@refused(PlanError, "`<never>`")
def a_rule_for_a_token_that_its_source_has_not(root):
    tokens = {"<x>": {"source": {"kind": "model_token", "model": str(root / "two"), "token": "<never>"}}}
    return sized(root, tokenizer={"source": "union", "tokens": tokens})


@refused(PlanError, "`chat_template: base` finds no chat template")
def a_template_of_a_model_that_has_none(root):
    return sized(root, tokenizer_source="union", chat_template="base")


# slices


def sliced(*sources: tuple[Path, int, int], method: str = "linear") -> Recipe:
    listed = [{"model": str(folder), "layer_range": [first, end]} for folder, first, end in sources]
    return {"merge_method": method, "slices": [{"sources": listed}]}


@refused(PlanError, "layers")
def layers_that_a_model_has_not(root):
    return sliced((expert(root), 0, 9))


@refused(RecipeError, "layer_range")
def ranges_of_other_lengths(root):
    return sliced((expert(root), 0, 2), (base(root), 0, 1))


@refused(RecipeError, "layer_range")
def a_range_that_ends_before_it_begins(root):
    return sliced((expert(root), 2, 1))


@refused(PlanError, "do not fit")
def layers_of_other_widths(root):
    narrow = {name: t[..., :8] if t.dim() == 2 else t[:8] for name, t in llama_tensors().items()}
    return sliced((expert(root), 0, 2), (model(root / "narrow", narrow, hidden_size=8), 0, 2))


@refused(PlanError, "do not fit")
def layers_of_other_widths_above_each_other(root):
    narrow = {name: t[..., :8] if t.dim() == 2 else t[:8] for name, t in llama_tensors().items()}
    parts = [(expert(root), 0, 1), (model(root / "narrow", narrow, hidden_size=8), 1, 2)]
    return {"merge_method": "passthrough", "slices": [sliced(part)["slices"][0] for part in parts]}


# places


@refused(CheckpointError, "`org/nothing`")
def a_model_that_was_never_fetched(root):
    return recipe("org/nothing", expert(root))


@refused(CheckpointError, "`ftp://` is no place that models are read from")
def a_url_of_another_kind(root):
    return recipe("ftp://host/model", expert(root))


@pytest.mark.parametrize("case", CASES)
def test_models_that_do_not_fit_are_refused_before_anything_is_written(case, tmp_path, monkeypatch):
    says, error, message = CASES[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mapping, out = says(tmp_path), tmp_path / "out"
    for attempt in (lambda: streammerge.plan(mapping), lambda: streammerge.merge(mapping, out)):
        with pytest.raises(error) as raised:
            attempt()
        assert message in raised.value.message
        assert raised.value.hint
        assert not list(tmp_path.glob("out*"))


def test_a_url_without_the_package_that_reads_it_says_which(tmp_path, monkeypatch):
    for module in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CheckpointError, match="`s3://bucket/model` needs the package `obstore`") as raised:
        streammerge.plan(recipe("s3://bucket/model", expert(tmp_path)))
    assert raised.value.hint == "Install `streammerge[remote]`."


def test_integers_that_are_no_weights_are_copied(tmp_path):
    plan = streammerge.plan(recipe(expert(tmp_path), base(tmp_path)))
    assert next(step.method for step in plan.steps if step.name == "model.position_ids") == "copy"
    packed = [mixture(tmp_path / name, 4, stacked=True, dtype=torch.int8) for name in "ab"]
    kept = recipe(*packed, base_model=str(packed[0]), rules=[{"match": "experts", "keep": "base"}])
    assert all(step.method == "copy" for step in streammerge.plan(kept).steps if "experts" in step.name)
