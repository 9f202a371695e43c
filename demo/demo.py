"""Fine-tune three experts of a real language model, merge them, measure what each merge keeps.

Reads only what pip installed; every stage says on stderr how long it took, the table goes to stdout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

# waiting threads that spin make training four times slower where anything else runs; read as torch loads
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import recipes
import torch
from cache import cached_json, cached_model, key_of
from measure import Losses, format_table, gain_kept, held_out_loss
from models import BASE_PACKAGE, Training, base_file, keep_freed_memory, load, write_base, write_expert
from texts import DOMAINS, MissingPackageError, draw_windows, split
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import streammerge
from streammerge.errors import StreamMergeError

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "demo"
MEMORY = "1GiB"
HELD_OUT_SEED = 2
CAPTURED_WINDOWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """One domain's windows of tokens, [count, tokens] int64 each."""

    training: Tensor
    held_out: Tensor


def say(text: str = "") -> None:
    """Talk to the person watching; stdout carries only results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def stage(name: str) -> Iterator[list[str]]:
    """Say how long something took. What is appended to the yielded list is said too."""
    started = time.perf_counter()
    notes: list[str] = []
    yield notes
    say(f"{name:<28} {time.perf_counter() - started:6.1f} s  {', '.join(notes)}".rstrip())


def make_base() -> Path:
    """Find or write the base model's folder."""
    gguf = base_file()
    settings = {"file": gguf.name, "bytes": gguf.stat().st_size, "package": package_version(BASE_PACKAGE)}
    with stage("base model") as notes:
        base, made = cached_model(CACHE, "base", settings, lambda folder: write_base(gguf, folder))
        notes.append(f"{gguf.name}, {'dequantised to bf16' if made else 'cached'}")
    return base


def package_version(package: str) -> str:
    """The installed version, or a word for a copy that pip knows nothing of."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def read_texts(base: Path, training: Training, held_out_windows: int) -> dict[str, Texts]:
    """Draw every domain's windows, the held-out ones from documents that no training window is from."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = {}
    for domain in DOMAINS:
        with stage(f"text {domain.name}") as notes:
            sides = split(domain.documents())
            counts = (training.windows, held_out_windows)
            drawn = [
                torch.tensor(draw_windows(side, tokenizer, count=count, length=training.window_tokens, seed=seed))
                for side, count, seed in zip(sides, counts, (training.seed, HELD_OUT_SEED), strict=True)
            ]
            texts[domain.name] = Texts(training=drawn[0], held_out=drawn[1])
            notes.append(f"{domain.source}; {len(sides[0])} documents to train on, {len(sides[1])} held out")
    return texts


def make_expert(name: str, base: Path, windows: Tensor, training: Training) -> Path:
    """Find or train the expert of one domain. The key holds the very tokens it sees."""
    settings = {
        "base": base.parent.name,
        "training": asdict(training),
        "windows": key_of({"tokens": windows.tolist()}),
    }
    with stage(f"expert {name}") as notes:
        expert, made = cached_model(
            CACHE, f"expert-{name}", settings, lambda folder: write_expert(base, windows, training, folder)
        )
        tokens = f"{training.steps} steps of {training.windows_per_step * training.window_tokens} tokens"
        notes.append(tokens if made else "cached")
    return expert


def merge_all(
    names: Sequence[str], base: Path, experts: Mapping[str, Path], texts: Mapping[str, Texts], output: Path
) -> dict[str, Path]:
    """Merge the experts every way, each into a fresh folder below `output`."""
    merged = {}
    for name in names:
        folder = output / name
        clear(folder)
        beside = recipes.method_of(name).beside
        data = (
            [captured(domain, path, texts[domain].training, beside == "fisher") for domain, path in experts.items()]
            if beside
            else []
        )
        with stage(f"merge {name}") as notes:
            streammerge.merge(recipes.recipe(name, base, list(experts.values()), data), folder, memory=MEMORY)
            notes.append(f"within {MEMORY}")
        merged[name] = folder
    return merged


def captured(domain: str, expert: Path, windows: Tensor, fisher: bool) -> Path:
    """What `streammerge capture` stores of an expert run over the text it was trained on; made once."""
    folder = expert.parent / f"data{'-fisher' if fisher else ''}"
    if folder.is_dir():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(expert)
    lines = expert.parent / "text.jsonl"
    texts = tokenizer.batch_decode(windows[:CAPTURED_WINDOWS])
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    with stage(f"capture {domain}") as notes:
        streammerge.capture(expert, lines, folder, memory="2GiB", fisher=fisher)
        notes.append(f"{len(texts)} texts")
    return folder


def clear(folder: Path) -> None:
    """Remove an earlier merge and what an interrupted one left. Anything else stays, and `merge` refuses it."""
    interrupted = folder.with_name(f"{folder.name}.partial")
    for made, sign in ((folder, "streammerge.json"), (interrupted, "journal.jsonl")):
        if not made.is_symlink() and (made / sign).is_file():
            shutil.rmtree(made)


def measure(folder: Path, texts: Mapping[str, Texts]) -> Losses:
    """A model folder's held-out loss on every domain."""
    model = load(folder, torch.bfloat16)
    return {name: held_out_loss(model, text.held_out) for name, text in texts.items()}


def continue_prompts(folder: Path) -> None:
    """Load a merged folder as anyone would, and print what it makes of one prompt of each domain."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder, torch.bfloat16)
    for domain in DOMAINS:
        prompt = tokenizer(domain.prompt, return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)
        print(f"\n[{domain.name}]\n{tokenizer.decode(tokens[0], skip_special_tokens=True)}")


def run(names: Sequence[str], output: Path, training: Training, held_out_windows: int) -> None:
    """The whole demo."""
    started = time.perf_counter()
    base = make_base()
    texts = read_texts(base, training, held_out_windows)
    experts = {name: make_expert(name, base, text.training, training) for name, text in texts.items()}
    merged = merge_all(names, base, experts, texts, output)

    rows: dict[str, Losses] = {}
    asked = key_of({name: text.held_out.tolist() for name, text in texts.items()})
    for name, folder in {"base": base, **{f"expert {name}": path for name, path in experts.items()}}.items():
        with stage(f"loss of {name}"):
            # these folders never change, unlike the merges
            rows[name] = cached_json(folder.parent / f"losses-{asked}.json", partial(measure, folder, texts))
    for name, folder in merged.items():
        with stage(f"loss of {name}"):
            rows[name] = measure(folder, texts)
    at_home = {name: rows[f"expert {name}"] for name in experts}
    kept = {name: gain_kept(losses, rows["base"], at_home) for name, losses in rows.items()}
    say()
    print(format_table(rows, kept))
    print("\naverage adds each expert's change with weight 1/3, task_arithmetic with weight 1; actmat has no weight")

    made = {name: json.loads((folder / "streammerge.json").read_text())["recipe"] for name, folder in merged.items()}
    results = {"nats_per_token": rows, "gain_kept": kept, "training": asdict(training), "recipes": made}
    path = output / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    best = merged.get("actmat") or merged[names[-1]]
    print(f"""
The merged models are ordinary folders:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (c.from_pretrained("{best}") for c in (AutoModelForCausalLM, AutoTokenizer))
    print(tokenizer.decode(model.generate(**tokenizer("{DOMAINS[1].prompt}", return_tensors="pt"))[0]))

{best} continues a prompt of each domain:""")
    continue_prompts(best)
    say(f"\ndone in {time.perf_counter() - started:.0f} s, numbers in {path}")


def main() -> int:
    """Read the arguments and run; errors that the reader can act on become one message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the merged models")
    parser.add_argument("--methods", default=",".join(recipes.SHOWN), metavar="NAMES", help="of `methods`, or `all`")
    parser.add_argument("--quick", action="store_true", help="a tenth of the training, to see that it runs")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    training, held_out_windows = Training(), 16
    if arguments.quick:
        training, held_out_windows = replace(training, steps=4), 4
    try:
        run(recipes.names(arguments.methods), arguments.output, training, held_out_windows)
    except MissingPackageError as error:
        say(f"error: {error}")
        return 1
    except StreamMergeError as error:
        say(f"error: {error.message}" + (f"\n\nhint: {error.hint}" if error.hint else ""))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
