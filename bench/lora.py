"""Time `actmat` of eight adapters onto a 7B-shaped base, and the memory that it takes.

python bench/lora.py --seven

The base is one file with holes: reading it costs no disk, and its weights are zeros. The adapters are real: float32
factors of every linear layer. Merged twice: as an adapter, which is the covariance systems alone, and as a model, of
which nothing is written.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import rows
import torch
from llama import SIZES, Shape
from safetensors.torch import save_file

import streammerge
from streammerge.budget import parse_bytes
from streammerge.layout import lay_out
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from streammerge.storage.local import LocalStorage
from streammerge.stream import Stream

# of Llama-2-7B and its like
SEVEN = Shape(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128,
)  # fmt: skip
PREFIX = "base_model.model."


def make_base(folder: Path, shape: Shape) -> None:
    """A model's folder whose one weight file is its header and a hole."""
    folder.mkdir(parents=True)
    layout = lay_out(((name, "BF16", dims) for name, dims in shape.tensors().items()), 1 << 62)
    (shard,) = layout.shards
    with (folder / shard.file).open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.nbytes)
    (folder / "config.json").write_text(json.dumps(shape.config()))


def make_adapter(folder: Path, shape: Shape, rank: int, seed: int) -> None:
    """Factors of every linear layer, as large as after a short training."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, dims in shape.tensors().items():
        if "_proj" in name:
            module = PREFIX + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, dims[1], generator=generator) / dims[1] ** 0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(dims[0], rank, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def resident_bytes() -> int:
    """Anonymous memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def peak_of(work: Callable[[], object]) -> int:
    """The most anonymous memory that a piece of work takes beyond what was there before."""
    before, seen, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(resident_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        work()
    finally:
        done.set()
        watching.join()
    return max(seen) - before


def stream(plan: Plan) -> None:
    """Merge without writing."""
    with Stream(plan, LocalStorage()) as blocks:
        for block in blocks:
            block.release()


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--seven", action="store_true", help="take the shape of a 7B model instead of `--size`")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--memory", default="1GiB")
    chosen = parser.parse_args()
    size = "7b" if chosen.seven else chosen.size
    shape = SEVEN if chosen.seven else SIZES[size]
    folder = chosen.work / f"lora-{size}-{chosen.rank}-{chosen.experts}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make_base(folder / "base", shape)
        adapters = [folder / f"adapter{number}" for number in range(chosen.experts)]
        for number, adapter in enumerate(adapters):
            make_adapter(adapter, shape, chosen.rank, number)
        recipe = {
            "merge_method": "actmat",
            "base_model": str(folder / "base"),
            "models": [{"model": str(adapter)} for adapter in adapters],
        }
        plan = make_plan(Recipe.from_dict(recipe), LocalStorage(), memory_bytes=parse_bytes(chosen.memory))
        thin = sum(step.thin for step in plan.steps)
        matrices = sum(step.by_matrix for step in plan.steps)
        assert thin == matrices, f"{matrices - thin} of {matrices} matrices are merged in full"
        report = streammerge.merge(recipe, folder / "merged", memory=chosen.memory, as_adapter=True)
        started = time.perf_counter()
        peak = peak_of(partial(stream, plan))
        facts = {
            "size": size,
            "rank": chosen.rank,
            "experts": chosen.experts,
            "matrices": matrices,
            "systems_seconds": report.seconds.computing,
            "merge_seconds": time.perf_counter() - started,
            "peak_bytes": peak,
            "planned_bytes": plan.memory.peak_bytes,
            "budget_bytes": plan.memory.budget_bytes,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows.append(chosen.results, "lora", facts)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
