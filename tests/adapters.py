"""Adapters for tests: written to disk as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."


def factors(tensors: Mapping[str, Tensor], modules: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """A and B, of the rank that `modules` says of each, for weights [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, rank in modules.items():
        rows, columns = tensors[f"{module}.weight"].shape
        found[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        found[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.05
    return found


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """Write an adapter's folder; of rank 4 and scale 2 where `config` says nothing."""
    folder.mkdir(parents=True)
    table = {"peft_type": "LORA", "base_model_name_or_path": None, "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def dense(tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float = 2.0) -> dict[str, Tensor]:
    """The model with W0 + s·B·A for each adapted weight, in float32."""
    found = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = adapter[f"{PREFIX}{module}.lora_B.weight"]
            weight = tensors[f"{module}.weight"].double() + scale * (b.double() @ a.double())
            found[f"{module}.weight"] = weight.float()
    return found
