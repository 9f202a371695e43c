"""Models for a capture: loaded by transformers, without any code of theirs, and their tensors found in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from streammerge import owners
from streammerge.capturing.samples import Sample
from streammerge.checkpoint import Checkpoint
from streammerge.errors import PlanError, StreamMergeError, escaped, quoted
from streammerge.pickled import PICKLED_ENDINGS


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor on disk lies in the model.

    parameter  its name in memory
    part       which matrix of a stack it lies in; None where it is no part of a stack
    whole      whether it is the parameter itself
    hub_name   what transformers calls it on disk
    """

    parameter: str
    part: int | None
    whole: bool
    hub_name: str

    def address(self, model: Any) -> int:
        """Where the matrix lies that the model multiplies by."""
        weight = model.get_parameter(self.parameter)
        return int((weight if self.part is None else weight[self.part]).data_ptr())


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import transformers, and have it say errors only and show no bars."""
    try:
        from transformers.utils import logging

        talk: Any = logging
    except ImportError as error:
        raise StreamMergeError(
            "`transformers` is not installed, and a capture runs the model with it",
            hint="Install it: `pip install 'streammerge[transformers]'`.",
        ) from error
    verbosity, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(verbosity)
        if bars:
            talk.enable_progress_bar()


def refuse_unfit(checkpoint: Checkpoint) -> None:
    location = quoted(checkpoint.location)
    if checkpoint.config.get("quantization_config"):
        raise PlanError(f"{location} is quantised", hint="Dequantise it to bfloat16 first.")
    if any(name.endswith(PICKLED_ENDINGS) for name in checkpoint.header_sha256):
        raise PlanError(
            f"{location} has pickled weights, which a capture does not run",
            hint="Convert them to safetensors first: load with transformers, then `save_pretrained`.",
        )
    if "adapter_config.json" in checkpoint.files:
        raise PlanError(f"{location} holds an adapter beside the weights", hint="Merge it into them first.")
    if "config.json" not in checkpoint.files:
        raise PlanError(f"{location} has no config.json", hint="Name a Hugging Face model folder.")


def build_skeleton(checkpoint: Checkpoint) -> Any:
    """The model without its weights."""
    try:
        return owners.build(owners.without_dropped_keys(checkpoint.config))
    except owners.not_buildable() as error:
        raise PlanError(
            f"{quoted(checkpoint.location)} is no model that transformers builds: {escaped(repr(error))}",
            hint="A capture needs an architecture that ships with transformers: a model's own code is never run.",
        ) from error


def attention_of(skeleton: Any) -> str:
    return "sdpa" if getattr(skeleton, "_supports_sdpa", False) else "eager"


def load_model(checkpoint: Checkpoint, skeleton: Any) -> Any:
    """The model with its weights in float32, from this folder alone."""
    config = skeleton.config
    # loops over experts show each one's input, where a fused product would not
    config._experts_implementation = "eager"
    config.use_cache = False
    try:
        model, found = type(skeleton).from_pretrained(
            os.path.abspath(checkpoint.location),
            config=config,
            dtype=torch.float32,
            attn_implementation=attention_of(skeleton),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except owners.not_buildable() as error:
        raise PlanError(
            f"{quoted(checkpoint.location)} cannot be loaded by transformers: {escaped(error)}",
            hint="`streammerge inspect` shows what its files hold. Compare with config.json.",
        ) from error
    if found["missing_keys"]:
        raise PlanError(
            f"{quoted(checkpoint.location)} lacks {len(found['missing_keys'])} tensors of its architecture, "
            f"such as {quoted(min(found['missing_keys']))}",
            hint="The download is incomplete, or config.json is another model's.",
        )
    return model.eval().requires_grad_(False)


def stored_as(skeleton: Any, checkpoint: Checkpoint) -> dict[str, Stored]:
    """For each tensor on disk that the model has, where it lies in memory."""
    in_memory = skeleton.state_dict()
    prefix = f"{skeleton.base_model_prefix}."
    places: dict[str, Stored] = {}
    for hub_name, memory_name, tensor, flipped in owners.stored_tensors(skeleton):
        held = in_memory[memory_name]
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", hub_name)
        stacked = held.ndim == 3 and tensor.ndim == 2 and numbers
        whole = tensor.shape == held.shape and not flipped
        place = Stored(memory_name, int(numbers[-1]) if stacked else None, whole, hub_name)
        # a model saved without its head, or its body alone, differs by this prefix
        for name in (hub_name, prefix + hub_name, hub_name.removeprefix(prefix)):
            places.setdefault(name, place)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    return {
        name: places[name] for name in checkpoint.tensors if name in places and places[name].parameter in parameters
    }


def refuse_unreadable(skeleton: Any, samples: Sequence[Sample], location: str, fisher: bool) -> None:
    """Raise PlanError for a model that cannot take these tokens, or has no likelihood to differentiate."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config, name = skeleton.config, quoted(location)
    if getattr(config, "is_encoder_decoder", False) or skeleton.main_input_name != "input_ids":
        raise PlanError(f"{name} does not read text alone", hint="A capture runs decoders and encoders of text.")
    if fisher and type(skeleton).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise PlanError(f"{name} is no causal language model, so text has no likelihood", hint="Leave out `--fisher`.")
    largest, rows = max(int(s.ids.max()) for s in samples), skeleton.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise PlanError(
            f"{name} has {rows} token embeddings but its tokenizer yields token {largest}",
            hint="The tokenizer is another model's.",
        )
    longest, positions = max(len(s.ids) for s in samples), getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        raise PlanError(
            f"{name} reads {positions} tokens at most, but a sample has {longest}",
            hint=f"Pass `--max-tokens {positions}`.",
        )
