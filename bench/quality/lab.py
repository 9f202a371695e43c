"""The encoder's lab: for each kind of training and seed every merge, made by the product, judged on held-out texts."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from cache import cached_model
from transformers import AutoTokenizer

import streammerge

from . import encoder, estimates
from .analysis import alike, names_of, opened
from .encoder import Exam, Kind
from .experts import Adapters, Suite, say
from .ledger import ANALYSIS, EXPERTS, TERMS, ZERO_SHOT, Ledger
from .merges import MEMORY, SCALES, Merge, carried_out
from .tasks import TEST, VALIDATION, Task, load, sides
from .theorem import Terms

CAPTURED_TEXTS = 256
COVARIANCE = "covariance"


class EncoderLab:
    """One suite's experts of one kind and seed."""

    def __init__(self, suite: Suite, kind: Kind, seed: int, ledger: Ledger) -> None:
        self.suite, self.kind, self.seed, self.ledger = suite, kind, seed, ledger
        self.training = suite.of_seed(kind, seed)

    @property
    def facts(self) -> dict[str, Any]:
        """What all rows of this lab have in common."""
        settings: dict[str, Any] = {
            "tasks": [task.name for task in self.suite.tasks],
            "sizes": asdict(self.suite.sizes),
            "epochs": self.suite.training.epochs,
            "longer": list(self.suite.longer),
        }
        if self.kind == "lora" and self.suite.adapters != Adapters():
            settings["adapters"] = asdict(self.suite.adapters)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return {"setting": "encoder", "suite": digest, "kind": self.kind, "seed": self.seed, **settings}

    @cached_property
    def experts(self) -> dict[str, Path]:
        """Every task's expert, trained where it was not yet."""
        return {task.name: self.suite.expert(task, self.training) for task in self.suite.tasks}

    @cached_property
    def exams(self) -> dict[str, dict[str, Exam]]:
        """By side, then task."""
        tokenizer = AutoTokenizer.from_pretrained(self.suite.base)
        return {side: {task.name: self._exam(task, side, tokenizer) for task in self.suite.tasks} for side in _JUDGING}

    def _exam(self, task: Task, side: str, tokenizer: Any) -> Exam:
        path = sides(task, self.seed, self.suite.sizes, self.suite.cache)[side]
        head = self.suite.head(task, self.seed)
        return encoder.exam(load(path), head, tokenizer, self.suite.sizes.max_tokens)

    def references(self) -> None:
        """Rows of the base and of the experts, each on its own task."""
        self._once(ZERO_SHOT, lambda: encoder.accuracies(self.suite.base, self.exams[TEST]))
        self._once(EXPERTS, self._at_home)

    def _once(self, name: str, measure: Any) -> None:
        facts = {**self.facts, "name": name, "group": "references", "recipe": None}
        if facts not in self.ledger:
            self._note(facts, measure())

    def _at_home(self) -> dict[str, float]:
        found = {}
        for name, expert in self.experts.items():
            with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
                folder = self.dense(expert, Path(scratch) / "dense")
                found.update(encoder.accuracies(folder, {name: self.exams[TEST][name]}))
        return found

    @property
    def _scratch(self) -> Path:
        folder = self.suite.cache / "merged"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def dense(self, expert: Path, folder: Path) -> Path:
        """An expert as a whole model: itself or, of an adapter, the base with it, in `folder`."""
        if self.kind == "full":
            return expert
        recipe = {"merge_method": "task_arithmetic", "base_model": str(self.suite.base)}
        streammerge.merge({**recipe, "models": [{"model": str(expert)}]}, folder, memory=MEMORY)
        return folder

    def covariance(self, task: Task) -> Path:
        """What `streammerge capture` stores of an expert's inputs on texts that it was trained on; made once."""
        expert = self.experts[task.name]
        texts = sides(task, self.seed, self.suite.sizes, self.suite.cache)["training"]

        def make(folder: Path) -> None:
            model = self.dense(expert, folder / "dense")
            streammerge.capture(
                model,
                texts,
                folder / COVARIANCE,
                samples=CAPTURED_TEXTS,
                max_tokens=self.suite.sizes.max_tokens,
                memory=MEMORY,
            )
            shutil.rmtree(folder / "dense", ignore_errors=True)

        folder, _ = cached_model(
            self.suite.cache / "encoder" / f"{self.kind}-covariances",
            f"{task.name}-{self.seed}",
            {"expert": expert.parent.name, "texts": CAPTURED_TEXTS},
            make,
            f"{COVARIANCE}/config.json",
        )
        return folder / COVARIANCE

    def run(self, merges: Iterable[Merge]) -> None:
        """Add a row for each merge that has none yet."""
        for merge in merges:
            facts = {**self.facts, "name": merge.name, "group": merge.group, "recipe": merge.plain}
            if facts not in self.ledger:
                self._run(merge, facts)

    def _run(self, merge: Merge, facts: dict[str, Any]) -> None:
        tasks = self.suite.tasks[: merge.experts]
        scales: Sequence[float | None] = SCALES if merge.tuned else (None,)
        found: dict[float | None, float] = {}
        for scale in scales if merge.tuned else ():
            accuracy, _ = self._merged(merge, tasks, VALIDATION, scale)
            found[scale] = _mean(accuracy)
        best = max(found, key=lambda scale: found[scale]) if found else None
        accuracy, cost = self._merged(merge, tasks, TEST, best)
        self._note({**facts, **({"scale": best} if merge.tuned else {}), **cost}, accuracy)

    def _merged(
        self, merge: Merge, tasks: Sequence[Task], side: str, scale: float | None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        exams = {task.name: self.exams[side][task.name] for task in tasks}
        with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
            covariances = self._beside(merge, tasks, Path(scratch))
            recipe = merge.written(self.suite.base, [self.experts[task.name] for task in tasks], covariances)
            if scale is not None:
                recipe["parameters"] = {**recipe.get("parameters", {}), "lambda": scale}
            cost = carried_out(recipe, Path(scratch) / "merged")
            accuracy = encoder.accuracies(Path(scratch) / "merged", exams)
        gc.collect()
        return accuracy, cost

    def _beside(self, merge: Merge, tasks: Sequence[Task], scratch: Path) -> list[Path] | None:
        """What lies beside each expert: its measured covariances, estimated ones, or nothing."""
        if merge.method != "regmean":
            return None
        if merge.estimate is None:
            return [self.covariance(task) for task in tasks]
        for task in tasks:
            estimates.write(merge.estimate, self.suite.base, self.experts[task.name], scratch / task.name)
        return [scratch / task.name for task in tasks]

    def analyse(self) -> None:
        """A row of how near the experts' own covariances come to those of their inputs."""
        facts = {**self.facts, "name": ANALYSIS, "group": ANALYSIS, "recipe": None}
        if facts in self.ledger:
            return
        with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
            experts = {name: self.dense(path, Path(scratch) / name) for name, path in self.experts.items()}
            moments = {task.name: self.covariance(task) for task in self.suite.tasks}
            self.ledger.append({**facts, "matrices": rounded(alike(self.suite.base, experts, moments))})
        say(f"{self.kind} {self.seed} {ANALYSIS}")

    def error_terms(self) -> None:
        """A row of the angles between the experts' own covariances and those of their inputs; trains them again."""
        facts = {**self.facts, "name": TERMS, "group": TERMS, "recipe": None}
        if facts in self.ledger:
            return
        found: dict[str, dict[str, Any]] = {}
        for task in self.suite.tasks:
            terms = Terms()
            with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
                self.suite.train(task, self.training, Path(scratch), watch=terms)
            moment = opened(self.covariance(task))
            for name, angles in terms.angles({name: moment(name) for name in names_of(self.covariance(task))}).items():
                found.setdefault(name, {})[task.name] = angles
        self.ledger.append({**facts, "matrices": rounded(found)})
        say(f"{self.kind} {self.seed} {TERMS}")

    def _note(self, facts: Mapping[str, Any], accuracy: Mapping[str, float]) -> None:
        self.ledger.append({**facts, "accuracy": rounded(accuracy), "mean": round(_mean(accuracy), 5)})
        say(f"{facts['kind']} {facts['seed']} {facts['name']}: {100 * _mean(accuracy):.2f}")


_JUDGING = (VALIDATION, TEST)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def rounded(value: Any) -> Any:
    """Numbers to five digits, in whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value
