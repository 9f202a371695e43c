"""Held-out loss of a model, the share of the experts' gains that it keeps, and the table of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Losses = dict[str, float]
"""Nats per token, by domain."""

BATCH = 4


@torch.inference_mode()
def held_out_loss(model: Any, windows: Tensor) -> float:
    """Mean loss of predicting each token of each window but the first, in nats.

    windows [count, tokens] int64
    """
    total = 0.0
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        logits = model(batch).logits[:, :-1].float()  # [batch, tokens - 1, vocabulary]
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * (windows.shape[1] - 1))


def gain_kept(losses: Losses, base: Losses, experts: Mapping[str, Losses]) -> float:
    """How much of what each expert gained on its own domain a model gains too, averaged over domains.

    1 is as good as every expert at home, 0 as good as the base, less than 0 worse. An expert that gained
    nothing at home has nothing to keep, and its domain is left out.
    """
    shares = [
        (base[domain] - losses[domain]) / (base[domain] - expert[domain])
        for domain, expert in experts.items()
        if expert[domain] < base[domain]
    ]
    return sum(shares) / len(shares) if shares else float("nan")


def format_table(rows: Mapping[str, Losses], kept: Mapping[str, float]) -> str:
    """Lay out one model a row and one domain a column, then the mean and the share of gains kept."""
    domains = list(next(iter(rows.values())))
    head = ["nats per token", *domains, "mean", "gain kept"]
    body = [
        [
            name,
            *(f"{losses[domain]:.3f}" for domain in domains),
            f"{sum(losses.values()) / len(losses):.3f}",
            f"{kept[name]:.0%}" if kept[name] == kept[name] else "none",
        ]
        for name, losses in rows.items()
    ]
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *body)
    )
