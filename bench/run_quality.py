"""Train experts on real data, merge them every way, and see what is left of their skills: the quality lab.

Everything is cached and every finished number is a row, so that a run which was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

# set before torch loads: the lab shares its machine, and so small matrices gain nothing from threads
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))

import rows
import torch
from models import Training as LanguageTraining
from quality import merges, tables, tasks
from quality.continuations import ContinuationsLab
from quality.encoder import Training
from quality.experts import Adapters, Suite, say
from quality.lab import EncoderLab
from quality.language import Corpus, LanguageLab
from quality.ledger import Ledger, read
from quality.tasks import Sizes
from transformers.utils import logging as transformers_logging

TABLES = rows.ROOT / "bench" / "quality" / "RESULTS.md"
CACHE = rows.ROOT / ".cache" / "quality"
SEEDS = (0, 1, 2)
KINDS = ("full", "lora", "language")
PARTS = ("table", "analysis", "terms", "harness", "ideas", "ablations", "lengths", "training")
HARNESS = rows.ROOT / ".cache" / "harness-venv" / "bin" / "python"
# of adapters, other than the lab's own
TRAININGS = (Adapters(draws="one"), Adapters(learning_rate=3e-4), Adapters(targets="attention"))
# of every second task, for the experts trained for unequal times
LONGER = tuple(tasks.TASKS)[::2]
QUICK_SIZES = Sizes(training=160, validation=40, test=60, max_tokens=24)
QUICK_LANGUAGE = LanguageTraining(steps=4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="where data and experts are kept")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where rows are appended; of --quick in the cache")
    parser.add_argument(
        "--kind", choices=KINDS, action="append", help="of experts: the encoder's or the language model's; default: all"
    )
    parser.add_argument("--seed", type=int, action="append", help="of texts and training; default: 0, 1 and 2")
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all")
    parser.add_argument(
        "--harness", type=Path, default=HARNESS, metavar="PYTHON", help="of an environment with lm-evaluation-harness"
    )
    parser.add_argument("--quick", action="store_true", help="two tasks, a few steps: does everything run?")
    parser.add_argument(
        "--tables", type=Path, nargs="?", const=TABLES, metavar="FILE", help="only write the tables of all rows"
    )
    given = parser.parse_args(arguments)
    given.results = given.results or (given.cache / "quick" if given.quick else rows.RESULTS)
    if given.tables:
        tables.write(read(given.results / "quality.jsonl"), given.tables)
        return 0
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run(given)
    return 0


def run(given: argparse.Namespace) -> None:
    """The most wanted first. What was done in one pass is skipped in the next."""
    ledger = Ledger(given.results)
    suite = Suite(cache=given.cache, tasks=list(tasks.TASKS.values()))
    corpus = Corpus(cache=given.cache)
    seeds, kinds, parts = given.seed or SEEDS, given.kind or KINDS, given.only or PARTS
    if given.quick:
        suite = replace(suite, tasks=suite.tasks[:2], sizes=QUICK_SIZES, training=Training(epochs=1))
        corpus = replace(corpus, domains=corpus.domains[:2], training=QUICK_LANGUAGE, held_out=4, validation=2)
        seeds = seeds[:1]
    passes: tuple[tuple[Sequence[int], Sequence[str], Sequence[str]], ...] = (
        (seeds[:1], KINDS[:2], ("table", "analysis", "terms")),
        (seeds[:1], KINDS[:1], ("ideas",)),
        (seeds, KINDS, ("table",)),
        (seeds, KINDS, PARTS),
    )
    for seeds_now, kinds_now, parts_now in passes:
        for part, seed, kind in product(parts_now, seeds_now, kinds_now):
            if part not in parts or kind not in kinds:
                continue
            if part == "harness":
                if kind == "language":
                    judge_by_harness(ContinuationsLab(corpus, seed, ledger, python=given.harness))
                continue
            if part == "training":
                if kind == "lora":
                    judge_trainings(suite, seed, ledger)
                continue
            if kind == "language":
                lab: EncoderLab | LanguageLab = LanguageLab(corpus, seed, ledger)
            else:
                lab = EncoderLab(replace(suite, longer=LONGER) if part == "lengths" else suite, kind, seed, ledger)
            run_part(lab, part)


def run_part(lab: EncoderLab | LanguageLab, part: str) -> None:
    """One part of one lab, as far as that lab has it."""
    if part == "table":
        lab.references()
        wanted = sorted(merges.of_table(), key=lambda merge: merge.costly)
        lab.run(merge for merge in wanted if isinstance(lab, EncoderLab) or merge.name not in merges.FOR_HOURS)
        if isinstance(lab, EncoderLab) and lab.kind == "lora":
            lab.run(merges.of_adapters())
    elif part == "ideas":
        lab.run(merges.of_ideas())
        if isinstance(lab, EncoderLab) and lab.kind == "full":
            lab.run(merges.of_estimates())
    elif part == "analysis" and isinstance(lab, EncoderLab):
        lab.analyse()
    elif part == "terms" and isinstance(lab, EncoderLab) and lab.kind == "full":
        lab.error_terms()
    elif part == "ablations" and isinstance(lab, EncoderLab):
        lab.run((*merges.of_ablations(), *merges.of_counts()))
    elif part == "ablations":
        lab.run(merge for merge in merges.of_ablations() if merge.name in merges.ALSO_OF_LANGUAGE)
    elif part == "lengths" and isinstance(lab, EncoderLab) and lab.kind == "full":
        lab.references()
        lab.run(merges.of_lengths())


def judge_trainings(suite: Suite, seed: int, ledger: Ledger) -> None:
    """Adapters that were trained in other ways."""
    for adapters in TRAININGS:
        lab = EncoderLab(replace(suite, adapters=adapters), "lora", seed, ledger)
        lab.references()
        lab.run(merges.of_training())


def judge_by_harness(lab: ContinuationsLab) -> None:
    """The methods that are compared with the lm-evaluation-harness, where it is installed."""
    if not lab.python.is_file():
        say(f"no harness at {lab.python}: its rows are left out, `make .cache/harness-venv/ready` installs it")
        return
    lab.references()
    lab.run(merge for merge in merges.of_table() if merge.name in merges.BY_HARNESS)


if __name__ == "__main__":
    sys.exit(main())
