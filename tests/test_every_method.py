"""What every method of the table promises alike: the same bytes however it is run, and a model that loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streammerge
from streammerge import methods, stream
from streammerge.plan import Plan
from tests.models import llama_tensors, recipe_of, tuned
from tests.stored import MemoryStorage, streamed_tensors, tensors_of
from tests.test_device_stream import planned

# settings under which nothing is left undone
PARAMETERS: dict[str, dict[str, object]] = {
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.7, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.7, "gamma": 0.1},
    "sce": {"select_topk": 0.5},
    "knots": {"rule": "ties", "rule_parameters": {"density": 0.5}},
    "svc": {"rule": "actmat"},
    "larv": {"rule": "ties", "rule_parameters": {"density": 0.5}},
    "nearswap": {"t": 0.001},
    "slerp": {"t": 0.3},
}
ONE_EXPERT = ("slerp", "nearswap", "arcee_fusion", "passthrough")
every_method = pytest.mark.parametrize("method", methods.names())


def family_of(model: dict[str, Tensor], experts: int) -> list[dict[str, Tensor]]:
    """Experts that have half of their change in common: rules that trust only that go back to the base without it."""
    halfway = tuned(model, 99)
    return [tuned(halfway, seed + 1) for seed in range(experts)]


def experts_of(method: str) -> int:
    return 1 if method in ONE_EXPERT else 2 if method == "nuslerp" else 3


def beside_of(method: str, model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Data as a capture stores it: covariances of linear layers, squared gradients of all."""
    generator = torch.Generator().manual_seed(5)
    if methods.describe(method).beside == "covariance":
        matrices = {n: torch.randn(60, t.shape[1], generator=generator) for n, t in model.items() if "_proj" in n}
        return {name: rows.mT @ rows / 60 for name, rows in matrices.items()}
    return {n: torch.rand(t.shape, generator=generator) for n, t in model.items() if t.is_floating_point()}


def storage_for(method: str) -> MemoryStorage:
    base = llama_tensors()
    experts = family_of(base, experts_of(method))
    models = {"base": base} | {f"expert{i}": expert for i, expert in enumerate(experts)}
    if methods.describe(method).beside:
        models["data"] = beside_of(method, base)
    return MemoryStorage(models)


def plan_for(method: str, storage: MemoryStorage, **more: object) -> Plan:
    beside = methods.describe(method).beside
    data = {beside: "data"} if beside else {}
    models = [{"model": f"expert{i}", **data} for i in range(experts_of(method))]
    return planned(storage, method, models=models, parameters=PARAMETERS.get(method, {}), seed=3, **more)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_method
@pytest.mark.usefixtures("threads")
def test_the_bytes_depend_neither_on_slots_nor_on_threads(method, monkeypatch):
    storage = storage_for(method)
    results = []
    monkeypatch.setattr(stream, "SMALL_MATRIX_ELEMENTS", 0)
    # blocks in a stream begin at whole panels of 8192 elements, or are whole tensors: the small ones here
    for slot_bytes, count in ((1 << 14, 1), (1 << 16, 2), (4 << 20, 2)):
        monkeypatch.setattr(stream, "thread_limit", lambda count=count: count)
        results.append(streamed_tensors(plan_for(method, storage, slot_bytes=slot_bytes, device_bytes=None), storage))
    assert all(same(results[0], other) for other in results[1:])


@every_method
def test_a_device_gives_what_the_cpu_gives(method):
    storage = storage_for(method)
    plain = plan_for(method, storage, device_bytes=None, out_dtype="float32")
    wanted, found = (
        streamed_tensors(plain, storage),
        streamed_tensors(plan_for(method, storage, out_dtype="float32"), storage),
    )
    base = llama_tensors()
    for name, tensor in wanted.items():
        change = float((tensor - base[name]).float().norm())
        # covariances come packed there, in eleven bits; all else is the same arithmetic
        assert float((found[name] - tensor).float().norm()) <= 1e-3 * change + 1e-6 * float(tensor.float().norm()), name


@every_method
def test_something_is_merged_and_nothing_is_broken(method):
    storage = storage_for(method)
    plan = plan_for(method, storage, device_bytes=None, out_dtype="float32")
    base, found = llama_tensors(), streamed_tensors(plan, storage)
    changed = [n for n, t in found.items() if t.is_floating_point() and not torch.equal(t, base[n].float())]
    assert len(changed) >= 0.8 * sum(t.is_floating_point() for t in found.values())
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all()
        size = sum(float((expert[name].double() - base[name].double()).norm()) for expert in family_of(base, 3))
        assert float((tensor.double() - base[name].double()).norm()) <= 4 * size + 1e-12, name


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three experts as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    root = tmp_path_factory.mktemp("llamas")
    model.save_pretrained(root / "base")
    for number, expert in enumerate(family_of(dict(model.state_dict()), 3)):
        model.load_state_dict(expert)
        model.save_pretrained(root / f"expert{number}")
    return root / "base", [root / f"expert{number}" for number in range(3)]


@pytest.mark.filterwarnings("ignore")
@every_method
def test_transformers_loads_the_result_and_generates(method, llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    base, experts = llamas
    recipe = recipe_of({"base": base, **{e.name: e for e in experts[: experts_of(method)]}}, method)
    recipe["parameters"] = PARAMETERS.get(method, {})
    beside = methods.describe(method).beside
    if beside:
        (tmp_path / "data").mkdir()
        save_file(beside_of(method, tensors_of(base)), tmp_path / "data" / "model.safetensors")
        recipe["models"] = [{**model, beside: str(tmp_path / "data")} for model in recipe["models"]]
    streammerge.merge(recipe, tmp_path / "out")
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    stored = tensors_of(tmp_path / "out")
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.state_dict().items())
    written = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0
    )
    assert written.shape == (1, 5)
