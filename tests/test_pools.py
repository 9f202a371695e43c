"""Matrices that read the same input, merged as one matrix stacked by rows."""

from __future__ import annotations

import math

import pytest
import torch

from streammerge import methods
from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError
from streammerge.pools import input_of
from tests import odd_methods
from tests.models import llama_tensors, tuned
from tests.solve.changes import relative_error
from tests.stored import MemoryStorage, streamed, tensor_of
from tests.test_device_stream import engine, planned

ATTENTION = [f"model.layers.0.self_attn.{m}_proj.weight" for m in "qkv"]
GATED = [f"model.layers.0.mlp.{m}_proj.weight" for m in ("gate", "up")]


@pytest.fixture(autouse=True)
def _odd_methods(monkeypatch):
    for name in odd_methods.NAMES:
        monkeypatch.setitem(methods.METHODS, name, "tests.odd_methods")


@pytest.mark.parametrize(
    ("together", "apart"),
    [
        (["model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.v_proj.weight"],
         "model.layers.3.self_attn.o_proj.weight"),
        (["model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight"],
         "model.layers.4.mlp.up_proj.weight"),
        (["m.layers.0.mlp.experts.7.gate_proj.weight", "m.layers.0.mlp.experts.7.up_proj.weight"],
         "m.layers.0.mlp.experts.6.up_proj.weight"),
        (["l.0.block_sparse_moe.experts.1.w1.weight", "l.0.block_sparse_moe.experts.1.w3.weight"],
         "l.0.block_sparse_moe.experts.1.w2.weight"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.v.weight"],
         "encoder.block.0.layer.0.SelfAttention.o.weight"),
        (["decoder.block.0.layer.1.EncDecAttention.k.weight", "decoder.block.0.layer.1.EncDecAttention.v.weight"],
         "decoder.block.0.layer.1.EncDecAttention.q.weight"),
        (["bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.attention.self.key.weight"],
         "bert.encoder.layer.0.crossattention.self.key.weight"),
        (["vit.layer.0.attention.attention.query.weight", "vit.layer.0.attention.attention.value.weight"],
         "vit.layer.0.attention.output.dense.weight"),
        (["model.decoder.layers.0.encoder_attn.k_proj.weight", "model.decoder.layers.0.encoder_attn.v_proj.weight"],
         "model.decoder.layers.0.encoder_attn.q_proj.weight"),
        (["model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"],
         "model.layers.0.self_attn.q_b_proj.weight"),
    ],
    ids=lambda v: v.rsplit(".", 3)[-3] if isinstance(v, str) else None,
)  # fmt: skip
def test_names_tell_which_matrices_read_the_same_input(together, apart):
    assert len({input_of(name) for name in together}) == 1
    assert input_of(together[0]) is not None
    assert input_of(apart) != input_of(together[0])


def test_fused_and_other_weights_share_with_none():
    for name in ("model.layers.0.self_attn.qkv_proj.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"):
        assert input_of(name) is None


def family():
    base = llama_tensors()
    return MemoryStorage({"base": base, **{f"expert{i}": tuned(base, i + 1) for i in range(3)}})


def merged(plan, storage, skip=()):
    data, outcomes = streamed(engine(plan)(plan, storage, skip=set(skip)))
    entries = {step.name: step for step in plan.steps}
    return {n: tensor_of(d, entries[n].dtype, entries[n].shape) for n, d in data.items()}, outcomes


def pooled(storage, *, device=False, slot_bytes=128, **more):
    parameters = {"parameters": {"pool": "inputs", **more}}
    return planned(storage, "centres_rows", slot_bytes=slot_bytes, device_bytes=1 << 30 if device else None,
                   out_dtype="float32", **parameters)  # fmt: skip


@pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])
def test_a_pool_is_merged_as_its_rows_stacked_and_handed_out_by_name(device):
    storage = family()
    found, outcomes = merged(pooled(storage, device=device), storage)
    base, *experts = (llama_tensors(), *(tuned(llama_tensors(), i + 1) for i in range(3)))
    for group in (ATTENTION, GATED):
        stack = [torch.cat([model[name].double() for name in group]) for model in (base, *experts)]
        changes = [expert - stack[0] for expert in stack[1:]]
        wanted = stack[0] + sum(change + change.mean(dim=0) for change in changes)
        rows = [base[name].shape[0] for name in group]
        for name, part in zip(group, wanted.split(rows), strict=True):
            assert torch.allclose(found[name].double(), part, rtol=1e-5, atol=1e-7)
            assert outcomes[name].facts["rows"] == sum(rows)
            norms = [float((e[name].double() - base[name].double()).norm()) for e in experts]
            size = float((part - base[name].double()).norm())
            assert outcomes[name].norm_ratio == pytest.approx(size / (sum(norms) / 3), rel=1e-4)
            assert outcomes[name].changed == 1.0
    alone = "model.layers.0.self_attn.o_proj.weight"
    assert outcomes[alone].facts["rows"] == base[alone].shape[0]


def test_every_engine_and_slot_size_gives_the_same_bytes():
    storage = family()
    first, *others = (
        merged(pooled(storage, device=device, slot_bytes=size), storage)[0]
        for device in (False, True)
        for size in (128, 1024, 1 << 20)
    )
    assert all(list(o) == list(first) and all(torch.equal(o[n], first[n]) for n in first) for o in others)


@pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])
def test_a_pool_half_finished_is_merged_again_and_only_the_rest_handed_over(device):
    storage = family()
    plan = pooled(storage, device=device)
    whole, _ = merged(plan, storage)
    rest, _ = merged(plan, storage, skip=ATTENTION[:2])
    assert list(rest) == [name for name in whole if name not in ATTENTION[:2]]
    assert torch.equal(rest[ATTENTION[2]], whole[ATTENTION[2]])


def test_the_plan_prices_the_stacked_matrix():
    storage = family()
    plan = pooled(storage)
    steps = {step.name: step for step in plan.steps}
    alone = {step.name: step for step in planned(storage, "centres_rows").steps}
    for group in (ATTENTION, GATED):
        assert len({steps[name].pool for name in group}) == 1
        assert all(steps[name].workspace_bytes > 2 * alone[name].workspace_bytes for name in group[1:])
    assert plan.flops == sum(step.flops for step in alone.values())
    assert plan.read_bytes == sum(step.read_bytes for step in alone.values())
    names = [step.name for step in plan.steps]
    places = sorted(names.index(name) for name in ATTENTION)
    assert places[2] - places[0] == 2


def test_matrices_of_different_settings_are_not_pooled():
    plan = planned(
        family(), "centres_rows", parameters={"pool": [{"filter": "q_proj", "value": "none"}, {"value": "inputs"}]}
    )
    steps = {step.name: step for step in plan.steps}
    assert steps[ATTENTION[0]].pool is None
    assert steps[ATTENTION[1]].pool == steps[ATTENTION[2]].pool is not None


@pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])
def test_a_nan_is_named_in_the_matrix_that_holds_it(device):
    models = {"base": llama_tensors()}
    models |= {f"expert{i}": tuned(models["base"], i + 1) for i in range(3)}
    models["expert1"][ATTENTION[1]][2, 3] = math.nan
    storage = MemoryStorage(models)
    with pytest.raises(MergeError, match=rf"`{ATTENTION[1]}` in `expert1` holds NaN at \[2, 3\]"):
        merged(pooled(storage, device=device), storage)


@pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("method", ["actmat", "tact", "wudi", "swudi", "aswudi", "ace"])
def test_every_covariance_method_pools(method, device):
    storage = family()
    plan = planned(storage, method, slot_bytes=512, device_bytes=1 << 30 if device else None,
                   out_dtype="float32", parameters={"pool": "inputs"})  # fmt: skip
    found, _ = merged(plan, storage)
    base, *experts = (llama_tensors(), *(tuned(llama_tensors(), i + 1) for i in range(3)))
    order = [step.name for step in plan.steps]
    for group in (ATTENTION, GATED):
        # of equal magnitudes tact keeps the upper ones
        group = sorted(group, key=order.index)
        stack = [torch.cat([model[name].float() for name in group]) for model in (base, *experts)]
        described = methods.describe(method)
        defaults = {each.keyword: each.default for each in described.parameters.values()}
        wanted = described.merge(TensorDeltas(stack[0], stack[1:]), **defaults)
        rows = [base[name].shape[0] for name in group]
        for name, part in zip(group, wanted.split(rows), strict=True):
            assert relative_error(found[name] - base[name].float(), part) <= 1e-3
    alone = planned(storage, method, slot_bytes=512, device_bytes=None, out_dtype="float32")
    assert not torch.equal(merged(alone, storage)[0][ATTENTION[0]], found[ATTENTION[0]])
