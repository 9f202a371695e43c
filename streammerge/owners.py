"""What transformers says each tensor of a model is, from config.json alone: no weights, no remote code."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streammerge.errors import quoted
from streammerge.rules import Role, TensorClass

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

_ROUTER_CLASS = re.compile(r"Router$|TopKGating$|MoEV1Gate$")
_ROUTER_NAME = re.compile(r"(^|_)(gate|router)$")
_EXPERTS_CLASS = re.compile(r"Experts$")
# stacks of [in, out] whose class carries no `is_transposed`: Llama 4; gpt_oss before transformers 5
_STACKED_IN_OUT = frozenset({"Llama4TextExperts", "GptOssExperts"})
# what would make transformers fetch code or weights, or describes how numbers are packed
_DROPPED_KEYS = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "quantization_config",
        "backbone",
        "use_pretrained_backbone",
        "use_timm_backbone",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
    }
)


# config.json may ask for anything: what no model has is not built
_COUNT = re.compile(r"(layers?|blocks?|depths?|stages?|experts?|heads?|labels?)$")
MOST_OF_A_COUNT = 100_000
LARGEST_SIZE = 1 << 28
MOST_MODULES = 250_000


def roles_from_model(config: Mapping[str, Any]) -> dict[str, Role]:
    """What each tensor of a model is, under its names on disk and in memory, with and without prefix.

    Builds the architecture on the meta device, which takes seconds. Tensors of modules unknown here are
    left out. Empty when transformers is missing or `config`, the content of config.json, names no
    model that it ships.
    """
    try:
        return _roles_of(build(without_dropped_keys(config)))
    except not_buildable() as error:
        logger.debug("no owners for model type `%s`: %r", config.get("model_type"), error)
        return {}


def not_buildable() -> tuple[type[Exception], ...]:
    """What a constructor may raise, of whatever class config.json names, given whatever it contains.

    A missing package or attribute, a wrong type, sizes that do not divide, an assertion, a file that
    the model would need: each means only that the owners are not known.
    """
    causes = (
        ImportError,
        LookupError,
        AttributeError,
        ValueError,
        TypeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
        OSError,
        MemoryError,
    )
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return causes
    return (*causes, StrictDataclassError)


def without_dropped_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: without_dropped_keys(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _DROPPED_KEYS
    }


def build(config: dict[str, Any]) -> Any:
    """The model, its parameters on the meta device."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    refuse_absurd(config)
    architecture = config["architectures"][0]
    model_class = getattr(transformers, architecture)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise TypeError(f"`{architecture}` is not a model of transformers")
    model_config = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    # the one implementation that needs nothing installed or fetched
    model_config._attn_implementation = "eager"
    with _at_most(MOST_MODULES), init_empty_weights():
        return model_class(model_config)


def refuse_absurd(value: object, key: str = "") -> None:
    """Raise ValueError for a number in a config that no model has: what is built, and listed, grows with it."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            refuse_absurd(child, name)
    elif isinstance(value, (list, tuple)):
        for child in value:
            refuse_absurd(child, key)
    elif isinstance(value, int):
        most = MOST_OF_A_COUNT if _COUNT.search(key) else LARGEST_SIZE
        if abs(value) > most:
            raise ValueError(f"{quoted(key)} is more than {most}")


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Raise ValueError when more modules and parameters than that are made."""
    from torch.nn.modules import module

    made = 0

    def counted(owner: nn.Module, name: str, part: object) -> None:
        nonlocal made
        made += 1
        if made > count:
            raise ValueError(f"more than {count} modules and parameters")

    hooks = [
        module.register_module_module_registration_hook(counted),
        module.register_module_parameter_registration_hook(counted),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _roles_of(model: Any) -> dict[str, Role]:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    buffers = {name for name, _ in model.named_buffers()}
    head = model.get_output_embeddings()
    prefix = f"{model.base_model_prefix}."

    roles: dict[str, Role] = {}
    for disk_name, memory_name, tensor, flipped in stored_tensors(model):
        path, _, leaf = memory_name.rpartition(".")
        parent_path, _, attribute = path.rpartition(".")
        if not tensor.is_floating_point() or (memory_name in buffers and tensor.ndim > 1):
            role: Role | None = Role(TensorClass.BUFFER, source="owner")
        elif tensor.ndim < 2:
            role = Role(TensorClass.VECTOR, source="owner")
        elif modules[path] is head:
            role = Role(TensorClass.EMBEDDING, source="owner")
        elif _is_router(modules[path], modules[parent_path], attribute):
            role = Role(TensorClass.ROUTER, source="owner")
        else:
            role = _role_by_module(modules[path], leaf, tensor, flipped)
        if role is not None:
            # a model saved without its head, or its body alone, differs by this prefix
            for name in (disk_name, prefix + disk_name, disk_name.removeprefix(prefix)):
                roles.setdefault(name, role)
    return roles


def stored_tensors(model: Any) -> Iterator[tuple[str, str, Tensor, bool]]:
    """Every tensor as (name on disk, name in memory, the tensor as on disk, stored flipped).

    First as the hub stores them, one matrix an expert, then as they are in memory. Where transformers
    has no such mapping (before 5) or has changed it, names on disk are those in memory.
    """
    in_memory: dict[str, Tensor] = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
            revert_weight_conversion,
        )

        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        flips = {
            pattern: any(type(operation).__name__ == "Transpose" for operation in converter.operations)
            for converter in converters
            for pattern in converter.source_patterns
        }
        for disk_name, tensor in revert_weight_conversion(model, in_memory).items():
            memory_name, pattern = rename_source_key(
                disk_name, renamings, converters, model.base_model_prefix, in_memory
            )
            if memory_name in in_memory:
                yield disk_name, memory_name, tensor, pattern is not None and flips[pattern]
    except (ImportError, AttributeError, TypeError) as error:
        logger.debug("names on disk are taken for those in memory: %r", error)
    for name, tensor in in_memory.items():
        yield name, name, tensor, False


def _is_router(module: nn.Module, parent: nn.Module, attribute: str) -> bool:
    if any(_ROUTER_CLASS.search(type(owner).__name__) for owner in (module, parent)):
        return True
    # before transformers 5 a router was a plain Linear beside the experts, as shared_expert_gate still is
    return hasattr(parent, "experts") and _ROUTER_NAME.search(attribute) is not None


def _role_by_module(module: nn.Module, leaf: str, tensor: Tensor, flipped: bool) -> Role | None:
    """What a tensor of two dimensions or more is to the module that holds it; None if that is unclear."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    class_name = type(module).__name__
    transposed = False
    if leaf.endswith("bias") or "Norm" in class_name:
        kind = TensorClass.VECTOR
    elif isinstance(module, nn.Embedding):
        kind = TensorClass.EMBEDDING
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or tensor.ndim > 3:
        kind = TensorClass.CONVOLUTION
    elif _EXPERTS_CLASS.search(class_name):
        kind = TensorClass.STACK if tensor.ndim == 3 else TensorClass.MATRIX
        transposed = flipped != getattr(module, "is_transposed", class_name in _STACKED_IN_OUT)
    elif isinstance(module, (nn.Linear, nn.MultiheadAttention, Conv1D)):
        kind = TensorClass.MATRIX
        transposed = flipped != isinstance(module, Conv1D)
    elif sum(side > 1 for side in tensor.shape) < 2:
        kind = TensorClass.VECTOR
    elif "Embedding" in class_name:
        kind = TensorClass.EMBEDDING
    else:
        return None
    return Role(kind, transposed, source="owner")
