"""What an adapter's folder holds, as PEFT reads it: the factors' places in one file, and the config beside it."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from streammerge.adapters import ADAPTER_NAME, PREFIX
from streammerge.errors import MergeError, quoted
from streammerge.layout import Layout, lay_out
from streammerge.outcome import Block, Facts, Outcome
from streammerge.readahead import bytes_of
from streammerge.solve.thin import Factors
from streammerge.torch_dtypes import TORCH_DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A module that the adapter changes: by B·A [out, in] of this rank, scaled by one.

    module     its name in the model
    embedding  its weight is a table that is looked up, stored [in, out]
    """

    module: str
    out: int
    into: int
    rank: int
    embedding: bool = False

    @property
    def keys(self) -> tuple[str, str]:
        """What A and B are called in the file."""
        if self.embedding:
            return f"{PREFIX}{self.module}.lora_embedding_A", f"{PREFIX}{self.module}.lora_embedding_B"
        return f"{PREFIX}{self.module}.lora_A.weight", f"{PREFIX}{self.module}.lora_B.weight"

    def blocks(
        self, change: Factors, dtype: str, method: str, facts: Facts, skip: Container[str] = ()
    ) -> Iterator[Block]:
        """A and B as they are written, rounded to `dtype`, but for those to `skip`; `facts` come with each.

        change  of the target's rank. Raises MergeError where it leaves the range of the dtype.
        """
        for key, values in zip(self.keys, (change.right, change.left), strict=True):
            if key in skip:
                continue
            rounded = values.to(TORCH_DTYPES[dtype]).contiguous()
            if not bool(torch.isfinite(rounded).all()):
                raise MergeError(
                    f"{quoted(key)} leaves the range of {dtype}", hint="Choose a wider `out_dtype`, such as float32."
                )
            data = bytes_of(rounded.view(-1).view(torch.uint8))
            yield Block(key, 0, data, lambda: None, Outcome(key, method, facts=dict(facts)))


def adapter_layout(targets: Sequence[Target], dtype: str, whole: Sequence[tuple[str, str, tuple[int, ...]]]) -> Layout:
    """One file: every target's A and B, then what is held whole: name, dtype code, shape."""
    shapes = ((target.rank, target.into) for target in targets), ((target.out, target.rank) for target in targets)
    factors = [
        (key, dtype, shape)
        for target, *both in zip(targets, *shapes, strict=True)
        for key, shape in zip(target.keys, both, strict=True)
    ]
    layout = lay_out([*factors, *whole], 1 << 62)
    return replace(layout, shards=(replace(layout.shards[0], file=ADAPTER_NAME),))


def adapter_config(targets: Sequence[Target], base: str, **more: Any) -> bytes:
    """The text of adapter_config.json: every scale is one."""
    ranks = {target.module: target.rank for target in targets}
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    table: Mapping[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        **more,
    }
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
