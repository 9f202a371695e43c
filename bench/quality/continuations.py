"""A harness task for the language model's merges: which of four continuations is the text's own?

The questions are cut from the held-out documents of each domain and asked by EleutherAI's lm-evaluation-harness,
through `streammerge.evaluate`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from texts import Document, split

import streammerge

from .language import HELD_OUT, Corpus, LanguageLab, documents
from .ledger import Ledger
from .packages import unpacked
from .tasks import Task

CHOICES = 4
# words of a question and of each of its answers
BEGINNING, ENDING = 24, 12
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{beginning}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{own}}}}"
metric_list:
  - metric: acc
"""


def questions(texts: Sequence[Document], count: int, seed: int) -> list[dict[str, Any]]:
    """So many questions: `beginning`, four `endings` of the same domain, and which of them is its `own`."""
    generator = random.Random(seed)
    passages: list[list[str]] = []
    for document in texts:
        words = document.text.split()
        length = BEGINNING + ENDING
        passages += [words[start : start + length] for start in range(0, len(words) - length + 1, length)]
    generator.shuffle(passages)
    beginnings, endings = (
        [" ".join(passage[start:end]) for passage in passages]
        for start, end in ((0, BEGINNING), (BEGINNING, BEGINNING + ENDING))
    )
    found = []
    for number in range(min(count, len(passages))):
        others = sorted({ending for ending in endings if ending != endings[number]})
        choices = [endings[number], *generator.sample(others, CHOICES - 1)]
        generator.shuffle(choices)
        found.append({"beginning": beginnings[number], "endings": choices, "own": choices.index(endings[number])})
    return found


class ContinuationsLab(LanguageLab):
    """The language model's lab, judged by the share of right answers instead of the loss."""

    measure = "accuracy"

    def __init__(self, corpus: Corpus, seed: int, ledger: Ledger, *, python: Path, count: int = 25) -> None:
        super().__init__(corpus, seed, ledger)
        self.python, self.count = python, count

    @property
    def facts(self) -> dict[str, Any]:
        """As of the losses, with the number of questions of each domain."""
        return {**super().facts, "setting": "continuations", "questions": self.count}

    def judge(self, folder: Path, side: str, names: Iterable[str] | None = None) -> Mapping[str, float]:
        """Right answers of each domain's; the losses of texts that only choose a scale."""
        if side != HELD_OUT:
            return super().judge(folder, side, names)
        wanted = list(names or (domain.name for domain in self.corpus.domains))
        asked = {
            "tasks": [f"continuations_{name}" for name in wanted],
            "include_path": str(self._tasks()),
            "python": str(self.python),
            "offline": True,
        }
        found = streammerge.evaluate(folder, asked)
        return {name: found[f"continuations_{name}"]["acc"] for name in wanted}

    def _tasks(self) -> Path:
        """The folder of the harness's task files, of the same questions for all seeds."""
        folder = self.corpus.cache / "language" / f"continuations-{self.count}"
        folder.mkdir(parents=True, exist_ok=True)
        for domain in self.corpus.domains:
            self._write(domain, folder)
        return folder

    def _write(self, domain: Task, folder: Path) -> None:
        lines = folder / f"{domain.name}.jsonl"
        if lines.exists():
            return
        examples = domain.read(unpacked(domain.package, self.corpus.cache))
        _, held_out = split(list(documents(examples, self.corpus.document_characters)))
        task = _TASK.format(name=f"continuations_{domain.name}", questions=json.dumps(str(lines.absolute())))
        (folder / f"{domain.name}.yaml").write_text(task, encoding="utf-8")
        asked = questions(held_out, self.count, seed=0)
        lines.write_text("".join(json.dumps(question) + "\n" for question in asked), encoding="utf-8")
