"""Price a mixture of experts' many small matrices: planning them, and what a merge spends on each beside arithmetic.

python bench/moe.py [--size tiny]
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import child
import rows
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from streammerge import api, methods
from streammerge.delta import TensorDeltas
from streammerge.layout import lay_out

MODELS = ("base", "one", "two", "three")
METHODS = ("linear", "actmat")
MOST_PLAN_SECONDS = 5.0
SHARD_BYTES = 5_000_000_000
REPEATS = 3
# read from every so-manieth matrix, to compare with the method by itself
STRIDE = 97
_PLAN = """
import json, sys, time
from streammerge import api
began, cpu = time.perf_counter(), time.process_time()
plan = api.plan(sys.argv[1], memory="4GiB")
print(json.dumps({"steps": len(plan.steps), "bytes": plan.read_bytes, "torch": "torch" in sys.modules,
                  "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A mixture's sizes; those given are Qwen3-30B-A3B's. Without `body` it has its experts alone."""

    layers: int = 48
    experts: int = 128
    hidden: int = 2048
    wide: int = 768
    heads: int = 32
    key_heads: int = 4
    head: int = 128
    vocabulary: int = 151_936
    body: bool = True
    stacked: bool = False

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, as Qwen3-MoE has them on the hub or, stacked, in memory."""
        if self.body:
            yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for part, shape in (*self._body(), *self._experts()):
                yield f"model.layers.{layer}.{part}", shape
        if self.body:
            yield "model.norm.weight", (self.hidden,)
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _body(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if not self.body:
            return
        query, key = self.heads * self.head, self.key_heads * self.head
        for name, rows_ in (("q", query), ("k", key), ("v", key)):
            yield f"self_attn.{name}_proj.weight", (rows_, self.hidden)
        yield "self_attn.o_proj.weight", (self.hidden, query)
        for name, size in (("self_attn.q_norm", self.head), ("self_attn.k_norm", self.head),
                           ("input_layernorm", self.hidden), ("post_attention_layernorm", self.hidden)):  # fmt: skip
            yield f"{name}.weight", (size,)
        yield "mlp.gate.weight", (self.experts, self.hidden)

    def _experts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.stacked:
            yield "mlp.experts.gate_up_proj", (self.experts, 2 * self.wide, self.hidden)
            yield "mlp.experts.down_proj", (self.experts, self.hidden, self.wide)
            return
        for expert in range(self.experts):
            for name in ("gate", "up"):
                yield f"mlp.experts.{expert}.{name}_proj.weight", (self.wide, self.hidden)
            yield f"mlp.experts.{expert}.down_proj.weight", (self.hidden, self.wide)

    def config(self) -> dict[str, object]:
        """Of config.json what a merge reads."""
        return {"model_type": "qwen3_moe", "num_experts": self.experts, "vocab_size": self.vocabulary}


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """Seconds for one matrix, of the wall's clock and of all threads' processor time."""

    seconds: float
    cpu_seconds: float

    def less(self, other: Took) -> Took:
        """What is left beside `other`."""
        return Took(seconds=self.seconds - other.seconds, cpu_seconds=self.cpu_seconds - other.cpu_seconds)

    def shown(self) -> tuple[str, str]:
        """Both in milliseconds."""
        return f"{1e3 * self.seconds:.2f} ms", f"{1e3 * self.cpu_seconds:.2f} ms"


def hollow(folder: Path, shape: Shape) -> list[Path]:
    """Models of which only the headers take disk: their tensors are holes in the files."""
    layout = lay_out(((name, "BF16", dims) for name, dims in shape.tensors()), SHARD_BYTES)
    folders = [folder / name for name in MODELS]
    for each in folders:
        each.mkdir(parents=True)
        for shard in layout.shards:
            with (each / shard.file).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.nbytes)
        if (index := layout.index_json()) is not None:
            (each / "model.safetensors.index.json").write_text(index)
        (each / "config.json").write_text(json.dumps(shape.config()))
    return folders


def filled(folder: Path, shape: Shape) -> list[Path]:
    """Small models of random numbers: a base, and experts that moved a little."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(dims, generator=draw).mul_(0.02) for name, dims in shape.tensors()}
    folders = []
    for number, name in enumerate(MODELS):
        change = torch.Generator().manual_seed(number)
        scale = 0.002 if number else 0.0
        tensors = {
            key: (tensor + scale * torch.randn(tensor.shape, generator=change)).bfloat16()
            for key, tensor in base.items()
        }
        folders.append(folder / name)
        folders[-1].mkdir(parents=True)
        save_file(tensors, folders[-1] / "model.safetensors", metadata={"format": "pt"})
        (folders[-1] / "config.json").write_text(json.dumps(shape.config()))
    return folders


def planned(work: Path, shape: Shape) -> dict[str, float]:
    """Plan a merge of hollow models in a process of its own: the facts that it prints, and its whole time."""
    base, *experts = hollow(work, shape)
    recipe = child.write_recipe(work / "recipe.yaml", "actmat", experts, base)
    ran = child.run([sys.executable, "-c", _PLAN, str(recipe)])
    return ran.json() | {"command_seconds": ran.elapsed_seconds, "command_cpu_seconds": ran.cpu_seconds}


def merged(folders: list[Path], method: str, out: Path, matrices: int) -> Took:
    """Merge, in this process; the best of some times, for one matrix."""
    base, *experts = folders
    recipe = child.write_recipe(out.with_suffix(".yaml"), method, experts, base)
    taken = []
    for _ in range(REPEATS):
        shutil.rmtree(out, ignore_errors=True)
        began, cpu = time.perf_counter(), time.process_time()
        api.merge(recipe, out, memory="2GiB")
        taken.append(((time.perf_counter() - began) / matrices, (time.process_time() - cpu) / matrices))
    return Took(seconds=min(wall for wall, _ in taken), cpu_seconds=min(cpu for _, cpu in taken))


def arithmetic(folders: list[Path], method: str, out: Path) -> Took:
    """The method by itself on some of the matrices, one thread: the median. Refuses a merge that gave others."""
    files = [safe_open(each / "model.safetensors", "pt") for each in (*folders, out)]
    rule = methods.describe(method)
    arguments = {parameter.keyword: parameter.default for parameter in rule.parameters.values()}
    seconds, cpu_seconds = [], []
    names = list(files[0].keys())[::STRIDE]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in names:
        base, *experts, given = (file.get_tensor(name) for file in files)
        began, cpu = time.perf_counter(), time.process_time()
        change = rule.merge(TensorDeltas(base, experts, name=name), **arguments)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu)
        _refuse(name, base.float().add_(change), given)
    torch.set_num_threads(threads)
    return Took(seconds=median(seconds), cpu_seconds=median(cpu_seconds))


def _refuse(name: str, expected: Tensor, found: Tensor) -> None:
    # a unit in the last place of bf16, and a little more
    error = float((expected - found.float()).abs().max() / expected.abs().max())
    if error > 2.0**-7:
        raise SystemExit(f"error: {name} is {error:.1e} off the method by itself; nothing is timed")


def main() -> None:
    given: Namespace = rows.arguments(__doc__).parse_args()
    tried = given.size == "tiny"
    work: Path = given.work / "moe"
    shutil.rmtree(work, ignore_errors=True)
    shape = Shape(layers=2, experts=8) if tried else Shape()
    plan = planned(work / "plan", shape)
    shutil.rmtree(work / "plan")
    rows.append(given.results, "moe", {"part": "plan", "size": given.size, **plan})
    print(
        f"plan of {plan['steps']} tensors, {plan['bytes'] / 1e9:.0f} GB: {plan['seconds']:.2f} s "
        f"({plan['cpu_seconds']:.2f} s CPU), the process {plan['command_seconds']:.2f} s"
    )
    small = replace(shape, hidden=8, wide=8, body=False)
    large = replace(shape, layers=1, experts=2 if tried else 8, body=False)
    if tried:
        large = replace(large, hidden=64, wide=48)
    lines = []
    matrices = 3 * small.layers * small.experts
    for method in METHODS:
        folders = filled(work / "small", small)
        tiny = merged(folders, method, work / "out", matrices)
        alone = arithmetic(folders, method, work / "out")
        shutil.rmtree(work / "small")
        folders = filled(work / "large", large)
        real = merged(folders, method, work / "out", 3 * large.experts)
        shutil.rmtree(work / "large")
        beside = tiny.less(alone)
        share = beside.cpu_seconds / real.cpu_seconds
        facts = {"part": "merge", "size": given.size, "method": method, "matrices": matrices, "share": share}
        for label, took in (("small", tiny), ("arithmetic", alone), ("beside", beside), ("large", real)):
            facts |= {f"{label}_seconds": took.seconds, f"{label}_cpu_seconds": took.cpu_seconds}
        rows.append(given.results, "moe", facts)
        lines.append((method, *tiny.shown(), *beside.shown(), *real.shown(), f"{share:.2%}"))
    columns = ("method", f"{small.wide} x {small.hidden}", "CPU", "beside arithmetic", "CPU",
               f"{large.wide} x {large.hidden}", "CPU", "share of CPU")  # fmt: skip
    print(f"\none of {matrices} matrices, {len(MODELS) - 1} experts\n" + rows.table(columns, lines))
    shutil.rmtree(work)
    # of the processor: other work on the machine takes none of it
    if plan["torch"] or plan["command_cpu_seconds"] > MOST_PLAN_SECONDS:
        raise SystemExit(f"error: planning loaded torch or took more than {MOST_PLAN_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
