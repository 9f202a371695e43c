"""Run a model over text and store what `regmean` and `fisher` need of it: input second moments, squared gradients."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from streammerge.budget import available_memory_bytes, format_bytes
from streammerge.capturing.reading import quiet_transformers, refuse_unfit
from streammerge.capturing.run import MemoryNeed, Progress, Run
from streammerge.capturing.samples import digest_of, load_tokenizer, read_samples
from streammerge.checkpoint import Storage, load_checkpoint
from streammerge.errors import StreamMergeError
from streammerge.journal import refuse_taken
from streammerge_kernels.matmul import fast_matmul


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """What a capture did.

    tokens   how many were run, once; counts holds, by tensor, numbers that differ from it
    memory   by kind of capture, "covariance" and "fisher"; only what was not resumed as a whole
    """

    out: str
    samples: int
    tokens: int
    matrices: int
    counts: Mapping[str, int]
    memory: Mapping[str, MemoryNeed]
    seconds: float
    warnings: tuple[str, ...]

    def totals(self) -> dict[str, Any]:
        """For JSON."""
        memory = {kind: {**asdict(need), "peak": need.peak} for kind, need in self.memory.items()}
        return {**asdict(self), "counts": dict(self.counts), "memory": memory, "warnings": list(self.warnings)}

    def summary(self) -> str:
        """For people."""
        passes = ", ".join(
            f"{kind} in {len(need.sums)} pass{'' if len(need.sums) == 1 else 'es'}"
            for kind, need in self.memory.items()
        )
        peak = max((need.peak for need in self.memory.values()), default=0)
        return (
            f"captured the inputs of {self.matrices} matrices into {self.out}: {self.samples} samples, "
            f"{self.tokens} tokens, {passes or 'resumed'} in {self.seconds:.0f} s, planned {format_bytes(peak)}"
        )


def capture(
    model: str,
    data: str,
    out: str,
    storage: Storage,
    *,
    memory_bytes: int | None = None,
    max_tokens: int = 512,
    samples: int | None = None,
    batch_size: int = 8,
    fisher: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Captured:
    """Store each linear layer's input second moment in the new folder `out`, and the diagonal Fisher in `out/fisher`.

    A linear layer's tensor bears its weight's name: [in, in] float32, the mean over tokens of x xᵀ, uncentred and
    unscaled. Tensors of the Fisher have the weights' names and shapes, float32: the mean over samples of the squared
    gradient of log p(sample), the sum over its scored tokens. That is the empirical Fisher, with the data's own labels;
    Matena and Raffel (arXiv:2111.09832) take the mean over the model's own labels. Of a completion or of a chat's last
    answer only its own tokens are scored; all that is read counts for the moments.

    No batch is padded: samples of one length share one, so that a token's input never depends on its company. All
    arithmetic is float32, sums over batches float64. What does not fit the budget at once takes further passes over
    the data; the bytes are the same. Raises StreamMergeError.
    """
    started = time.perf_counter()
    if min(max_tokens, batch_size, 1 if samples is None else samples) < 1:
        raise StreamMergeError(
            "`max_tokens`, `batch_size` and `samples` begin at 1", hint="Leave them out, or raise them."
        )
    out = os.path.abspath(out)
    refuse_taken(out, resume=resume)
    checkpoint = load_checkpoint(storage, model)
    refuse_unfit(checkpoint)
    with quiet_transformers():
        texts = read_samples(data, load_tokenizer(model), max_tokens, samples, fisher)
        run = Run(checkpoint, texts, batch_size, fisher, memory_bytes or available_memory_bytes() // 2, progress)
        identity = {
            "capture": {"max_tokens": max_tokens, "samples": samples, "batch_size": batch_size, "fisher": fisher},
            "model": {
                file: {**asdict(checkpoint.files[file]), "header_sha256": digest}
                for file, digest in checkpoint.header_sha256.items()
            },
            "config": hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest(),
            "tokens": digest_of(texts),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        }
        with fast_matmul():
            run.load()
            run.write(out, identity, resume)
    return Captured(
        out=out,
        samples=len(texts),
        tokens=run.tokens,
        matrices=len(run.matrices),
        counts=run.counts,
        memory=run.memory,
        seconds=time.perf_counter() - started,
        warnings=tuple(run.warnings),
    )
