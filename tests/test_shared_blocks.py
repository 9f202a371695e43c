"""Blocks that merges have in common: taken from another only where it makes the very same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streammerge import api
from streammerge.outcome import Norms
from streammerge.plan import Plan
from streammerge.remembered import Remembered
from streammerge.shared_blocks import MergedPiece, SharedBlocks, same_steps
from streammerge.step import Step
from tests.models import llama_tensors, recipe_of, save_model, tuned

EMBEDDING = "model.embed_tokens.weight"
PIECES = [MergedPiece(Norms(2), [1.0, 2.0, 3.0, 0.0], {})]


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    base = llama_tensors()
    models = {"base": base, "one": tuned(base, 1), "two": tuned(base, 2)}
    return {name: save_model(tmp_path / name, tensors) for name, tensors in models.items()}


def step_of(plan: Plan) -> Step:
    return next(step for step in plan.steps if step.name == EMBEDDING)


def shared(remembered: Remembered | None, plan: Plan) -> SharedBlocks:
    return SharedBlocks(remembered, plan, step_of(plan))


def test_a_block_is_recalled_by_where_it_begins_and_how_long_it_is(family):
    plans = [api.plan(recipe_of(family, method)) for method in ("actmat", "wudi")]
    remembered = Remembered(1 << 16, same_steps(plans))
    one, other = (shared(remembered, plan) for plan in plans)
    block, out = torch.arange(64.0), torch.zeros(64)
    assert one.recall(0, block) is None
    one.keep(0, block, PIECES)
    assert other.recall(0, out) == PIECES
    assert torch.equal(out, block)
    # a merge with smaller slots has other blocks, and finds them
    assert other.recall(0, torch.zeros(32)) is None
    assert other.recall(64, torch.zeros(64)) is None


def test_only_what_several_merges_take_by_element_is_shared(family):
    plans = [api.plan(recipe_of(family, method)) for method in ("actmat", "wudi", "linear")]
    names = {str(identity[0]) for identity in same_steps(plans)}  # type: ignore[index]
    assert EMBEDDING in names
    assert not any("proj" in name for name in names)
    assert same_steps(plans[:1]) == frozenset()


def test_nothing_is_kept_of_what_one_merge_alone_makes_so(family):
    plan = api.plan(recipe_of(family))
    for remembered in (Remembered(1 << 16, same_steps([plan])), None):
        blocks, block = shared(remembered, plan), torch.arange(64.0)
        assert blocks.recall(0, block) is None
        blocks.keep(0, block, PIECES)
        assert blocks.recall(0, block) is None
