"""A full expert as an adapter: as near as its rank allows, and it says how near that is."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.errors import MergeError, PlanError
from streammerge.solve.nearest import nearest
from tests.adapters import PREFIX, dense, factors
from tests.models import llama_tensors, save_model, tuned
from tests.stored import digests, tensors_of

LAYER = "model.layers.0."
SOME = {f"{LAYER}self_attn.q_proj": 4, f"{LAYER}mlp.down_proj": 4}


@pytest.fixture
def base(tmp_path):
    tensors = llama_tensors(dtype=torch.float32)
    save_model(tmp_path / "base", tensors)
    return tensors


def extracted(tmp_path, tensors, rank=4, name="adapter", **options):
    if not (tmp_path / "expert").exists():
        save_model(tmp_path / "expert", tensors)
    return streammerge.extract(tmp_path / "expert", tmp_path / "base", tmp_path / name, rank=rank, **options)


def again(tmp_path):
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/base+{tmp_path}/adapter"}]}
    streammerge.merge(recipe, tmp_path / "again")
    return tensors_of(tmp_path / "again")


def test_a_low_rank_change_comes_back(tmp_path, base):
    expert = dense(base, factors(base, SOME))
    found = extracted(tmp_path, expert)
    assert set(found.errors) == set(SOME)
    assert found.worst[1] < 1e-5
    assert not found.whole
    for name, tensor in again(tmp_path).items():
        torch.testing.assert_close(tensor, expert[name], rtol=1e-5, atol=1e-7)


def test_any_other_change_is_the_nearest_of_its_rank_and_the_rest_is_whole(tmp_path, base):
    expert = tuned(base, 3)
    found = extracted(tmp_path, expert, rank=3)
    after = again(tmp_path)
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        if module not in found.errors:
            assert torch.equal(tensor, expert[name]), name
            continue
        change = (expert[name] - base[name]).double()
        sigma = torch.linalg.svdvals(change)
        best = (sigma[3:].square().sum() / sigma.square().sum()).sqrt().item()
        assert found.errors[module] == pytest.approx(best, rel=1e-2)
        assert ((tensor - expert[name]).double().norm() / change.norm()).item() == pytest.approx(
            found.errors[module], rel=1e-2
        )
    assert "model.embed_tokens.weight" in found.whole
    assert len(found.errors) == 14
    told = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    assert told["errors"] == found.errors
    assert f"at most {found.worst[1]:.1%}" in found.summary()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_the_nearest_matrix_is_near_the_best_and_its_distance_is_true(rows, columns, rank, seed):
    rank = min(rank, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    found, distance = nearest(matrix, rank)
    sigma = torch.linalg.svdvals(matrix)
    best = (sigma[rank:].square().sum() / sigma.square().sum()).sqrt().item()
    assert best - 1e-9 <= distance <= best * 1.01 + 1e-7
    actual = ((matrix - found.left @ found.right).norm() / matrix.norm()).item()
    assert distance == pytest.approx(actual, abs=1e-9)


def test_an_interrupted_extraction_continues_to_the_same_bytes(tmp_path, base):
    expert = tuned(base, 3)
    extracted(tmp_path, expert, name="whole")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extracted(tmp_path, expert, progress=stop)
    extracted(tmp_path, expert, resume=True)
    found, whole = digests(tmp_path / "adapter"), digests(tmp_path / "whole")
    assert found["adapter_model.safetensors"] == whole["adapter_model.safetensors"]
    assert found["adapter_config.json"] == whole["adapter_config.json"]


def test_what_an_adapter_cannot_hold_is_refused(tmp_path, base):
    buffer = "model.position_ids"
    with pytest.raises(PlanError, match=r"`model\.position_ids` changed and are no module's weight or bias"):
        extracted(tmp_path, dense(base, factors(base, SOME)) | {buffer: base[buffer] + 1})
    assert not (tmp_path / "adapter").exists()


def test_equal_models_and_other_models_are_refused(tmp_path, base):
    with pytest.raises(PlanError, match="no linear layer of"):
        extracted(tmp_path, base)
    save_model(tmp_path / "other", {"model.norm.weight": torch.zeros(3)})
    with pytest.raises(PlanError, match="do not fit together"):
        streammerge.extract(tmp_path / "other", tmp_path / "base", tmp_path / "adapter", rank=4)


def test_weights_that_stand_for_others_are_refused(tmp_path, base):
    expert = save_model(tmp_path / "expert", tuned(base, 1))
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(PlanError, match="is quantised by `gptq`") as raised:
        streammerge.extract(expert, tmp_path / "base", tmp_path / "out", rank=2)
    assert raised.value.hint
    assert not (tmp_path / "out").exists()


def test_a_nan_is_refused(tmp_path, base):
    expert = tuned(base, 3)
    expert[f"{LAYER}mlp.down_proj.weight"][0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"mlp\.down_proj\.weight` holds a NaN or an infinity, in the expert"):
        extracted(tmp_path, expert)
    assert not (tmp_path / "adapter").exists()


def test_a_budget_too_small_says_what_is_needed(tmp_path, base):
    with pytest.raises(PlanError, match="needs a budget of"):
        extracted(tmp_path, tuned(base, 3), memory="1MiB")


def test_biases_of_adapted_layers_are_kept(tmp_path, base):
    more = base | {f"{LAYER}self_attn.q_proj.bias": torch.ones(16)}
    save_model(tmp_path / "base2", more)
    expert = dense(more, factors(base, SOME)) | {f"{LAYER}self_attn.q_proj.bias": torch.zeros(16)}
    save_model(tmp_path / "expert", expert)
    found = streammerge.extract(tmp_path / "expert", tmp_path / "base2", tmp_path / "adapter", rank=4)
    assert found.whole == (f"{LAYER}self_attn.q_proj.bias",)
    stored = tensors_of(tmp_path / "adapter")
    assert not stored[f"{PREFIX}{LAYER}self_attn.q_proj.base_layer.bias"].any()
