"""The sentence encoder: frozen heads on its embeddings, experts fine-tuned below them, and their accuracy."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

from .tasks import Side

Kind = Literal["full", "lora"]
Targets = Literal["all", "attention"]
HEAD_FILE = "head.safetensors"
EPOCHS = "epochs"
# every linear layer of a block; its attention's output and its second feed-forward layer share the name `dense`
LORA_TARGETS = {
    "all": ("query", "key", "value", "dense"),
    "attention": ("query", "key", "value", r"attention\.output\.dense"),
}
HEAD_SCALE = 20.0
_EVALUATION_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How an expert is fine-tuned below its frozen head: AdamW, the rate rising for a tenth and then falling."""

    kind: Kind = "full"
    seed: int = 0
    epochs: int = 3
    batch: int = 32
    learning_rate: float = 1e-4
    lora_rank: int = 16
    lora_alpha: int = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of about one length: token ids and mask [texts, tokens] int64, classes [texts] int64."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def write_base(packaged: Path, folder: Path) -> None:
    """Save the pretrained model as this transformers does, without the buffers that older ones stored."""
    AutoModel.from_pretrained(packaged).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged).save_pretrained(folder)


def batches(
    side: Side, tokenizer: Any, *, max_tokens: int, size: int, shuffled: random.Random | None = None
) -> list[Batch]:
    """A side in batches of texts of about one length; `shuffled` mixes the texts before and the batches after."""
    ids: list[list[int]] = tokenizer(list(side.texts), truncation=True, max_length=max_tokens)["input_ids"]
    order = list(range(len(ids)))
    # sorting runs of so many batches, not all texts: batches then differ from epoch to epoch
    run = len(ids)
    if shuffled is not None:
        shuffled.shuffle(order)
        run = 12 * size
    runs = [sorted(order[start : start + run], key=lambda i: len(ids[i])) for start in range(0, len(order), run)]
    cuts = [part[start : start + size] for part in runs for start in range(0, len(part), size)]
    if shuffled is not None:
        shuffled.shuffle(cuts)
    return [_batch([ids[i] for i in cut], [side.labels[i] for i in cut]) for cut in cuts]


def _batch(ids: Sequence[Sequence[int]], labels: Sequence[int]) -> Batch:
    width = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return Batch(padded, mask, torch.tensor(labels))


def embed(model: Any, batch: Batch) -> Tensor:
    """The direction of the mean of each text's last hidden states, [texts, width] float32."""
    with torch.autocast("cpu", torch.bfloat16):
        states = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    weights = batch.mask.unsqueeze(-1).float()
    return normalize((states.float() * weights).sum(1), dim=1)


def write_head(base: Path, side: Side, classes: int, max_tokens: int, folder: Path) -> None:
    """Store a classifier of the base's embeddings: each class's mean direction, [classes, width] float32.

    It stays as it is while experts are trained and merges are judged, like the names' embeddings that CLIP compares
    with in the papers. A logistic regression in its place fits the training texts so well that little is left to learn.
    """
    model = AutoModel.from_pretrained(base).eval()
    sums = torch.zeros(classes, model.config.hidden_size)
    with torch.inference_mode():
        for batch in batches(side, AutoTokenizer.from_pretrained(base), max_tokens=max_tokens, size=_EVALUATION_BATCH):
            sums.index_add_(0, batch.labels, embed(model, batch))
    save_file({"directions": normalize(sums, dim=1)}, folder / HEAD_FILE)


def logits_of(embeddings: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """Cosines with each class's direction, times a fixed scale: [texts, classes]."""
    return HEAD_SCALE * embeddings @ head["directions"].T


class Watch(Protocol):
    """What looks at a model while it is trained."""

    def before(self, model: Any, batch: Batch, step: int) -> None:
        """Called before a batch goes through the model."""

    def after(self, model: Any, batch: Batch, step: int) -> None:
        """Called when the batch's gradients are there, and nothing has changed them yet."""


def write_expert(
    base: Path,
    head: Path,
    side: Side,
    max_tokens: int,
    training: Training,
    folder: Path,
    *,
    draw: int,
    targets: Targets = "all",
    watch: Watch | None = None,
) -> None:
    """Fine-tune the base below a frozen head and save it, float32: a whole model, or an adapter as PEFT writes it.

    Beside a whole model the folder `epochs` keeps what each epoch but the last ended with, of the layers alone.

    draw     what dropout and an adapter's first weights are drawn from
    targets  the layers that have an adapter
    """
    torch.manual_seed(draw)
    order = random.Random(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModel.from_pretrained(base).train()
    if training.kind == "lora":
        from peft import LoraConfig, get_peft_model

        names = rf"encoder\..*\.({'|'.join(LORA_TARGETS[targets])})"
        model = get_peft_model(
            model, LoraConfig(r=training.lora_rank, lora_alpha=training.lora_alpha, target_modules=names)
        )
    epochs = [
        batches(side, tokenizer, max_tokens=max_tokens, size=training.batch, shuffled=order)
        for _ in range(training.epochs)
    ]
    steps = sum(map(len, epochs))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps)
    )
    classifier = load_file(head / HEAD_FILE)
    for number, epoch in enumerate(epochs, 1):
        for step, batch in enumerate(epoch, (number - 1) * len(epoch)):
            if watch:
                watch.before(model, batch, step)
            loss = cross_entropy(logits_of(embed(model, batch), classifier), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            if watch:
                watch.after(model, batch, step)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if training.kind == "full" and number < len(epochs):
            (folder / EPOCHS).mkdir(exist_ok=True)
            layers = {name: weight.detach() for name, weight in model.named_parameters() if name.startswith("encoder.")}
            save_file(layers, folder / EPOCHS / f"{number}.safetensors")
    model.save_pretrained(folder)
    if training.kind == "full":
        tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Exam:
    """One task's questions: its batches and its frozen head."""

    batches: tuple[Batch, ...]
    head: Mapping[str, Tensor]


def exam(side: Side, head: Path, tokenizer: Any, max_tokens: int) -> Exam:
    """Tokenise a side once for all models that will be judged by it."""
    return Exam(
        tuple(batches(side, tokenizer, max_tokens=max_tokens, size=_EVALUATION_BATCH)), load_file(head / HEAD_FILE)
    )


@torch.inference_mode()
def accuracies(folder: Path, exams: Mapping[str, Exam]) -> dict[str, float]:
    """A model folder's share of right answers, by task."""
    model = AutoModel.from_pretrained(folder).eval()
    return {name: _accuracy(model, exam) for name, exam in exams.items()}


def _accuracy(model: Any, exam: Exam) -> float:
    right = [logits_of(embed(model, batch), exam.head).argmax(1) == batch.labels for batch in exam.batches]
    return torch.cat(right).float().mean().item()
