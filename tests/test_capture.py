"""Moments and Fishers of tiny models: what they are, whatever the budget, the batches and the interruptions."""

from __future__ import annotations

import builtins
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streammerge import api, write
from streammerge.capturing import samples
from streammerge.checkpoint import load_checkpoint
from streammerge.cli import cli
from streammerge.errors import OutputError, StreamMergeError
from streammerge.storage.local import LocalStorage

WORDS = [f"w{number}" for number in range(50)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    talk = transformers.utils.logging
    verbosity = talk.get_verbosity()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    yield
    talk.set_verbosity(verbosity)


def save(model: Any, folder: Path, *, template: str | None = None) -> Path:
    """Write a model with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "user", "assistant", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def llama() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
        initializer_range=0.4,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def qwen_moe() -> Any:
    torch.manual_seed(3)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def bert() -> Any:
    torch.manual_seed(4)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


MODELS = {"llama": llama, "gpt2": gpt2, "moe": qwen_moe, "bert": bert}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(llama(), tmp_path / "llama")


def words(seed: int, count: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))


def digests(folder: Path) -> dict[str, str]:
    """Every file, those of the Fisher's folder too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


TEXTS = [words(seed, count) for seed, count in enumerate((9, 5, 9, 17, 9, 5, 1, 9))]


def write_lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "data.jsonl", *({"text": text} for text in TEXTS))


@pytest.fixture
def likely(tmp_path: Path) -> Path:
    """Samples long enough to have a likelihood."""
    return write_lines(tmp_path / "likely.jsonl", *({"text": text} for text in TEXTS if " " in text))


def token_ids(folder: Path, text: str) -> Tensor:
    return torch.tensor(transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"])[None]


def in_float64(folder: Path) -> Any:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float64).eval()
    # torch's product of stacks knows no float64
    model.config._experts_implementation = "eager"
    return model


def hooked_moments(folder: Path, texts: list[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Second moments in float64, one text at a time, by hooks on the modules: an independent way."""
    model = in_float64(folder)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    with torch.no_grad():
        for text in texts:
            model(token_ids(folder, text))
    return {name: total / counts[name] for name, total in sums.items()}, counts


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        error = (found[name].double() - tensor).norm() / tensor.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_moments_are_those_of_float64_forward_hooks(kind, tmp_path, data):
    folder = save(MODELS[kind](), tmp_path / kind)
    captured = api.capture(folder, data, tmp_path / "out")
    expected, counts = hooked_moments(folder, TEXTS)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_close(found, expected)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert all(torch.equal(t, t.T) for t in found.values())
    assert set(counts.values()) == {captured.tokens} == {64}
    assert not captured.counts
    assert not captured.warnings


def test_tensors_bear_the_names_of_the_models_files(tmp_path, data):
    # the hub's GPT-2 lacks the prefix that transformers writes
    folder = save(gpt2(), tmp_path / "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    api.capture(folder, data, tmp_path / "prefixed")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    api.capture(folder, data, tmp_path / "out")
    prefixed, found = (load_file(tmp_path / name / "model.safetensors") for name in ("prefixed", "out"))
    assert "h.1.attn.c_attn.weight" in found
    assert prefixed.keys() == {f"transformer.{name}" for name in found}
    assert all(torch.equal(prefixed[f"transformer.{name}"], tensor) for name, tensor in found.items())


def test_the_folder_is_a_checkpoint_that_says_what_it_is(folder, data, tmp_path):
    api.capture(folder, data, tmp_path / "out", samples=3)
    checkpoint = load_checkpoint(LocalStorage(), str(tmp_path / "out"))
    weights = load_checkpoint(LocalStorage(), str(folder)).tensors
    assert all(entry.shape == (weights[name].shape[1],) * 2 for name, entry in checkpoint.tensors.items())
    assert len(checkpoint.tensors) == 14
    assert checkpoint.config["streammerge"] == {
        "kind": "covariance", "model": str(folder), "samples": 3, "tokens": 23, "counts": {},
    }  # fmt: skip
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "out.partial").exists()


def test_a_tokens_input_does_not_depend_on_what_shares_its_batch(folder, data, tmp_path):
    # nothing is padded: texts of other lengths change neither inputs nor counts
    for size in (1, 3, 8):
        api.capture(folder, data, tmp_path / f"by{size}", batch_size=size)
    alone = {n: t.double() for n, t in load_file(tmp_path / "by1" / "model.safetensors").items()}
    for size in (3, 8):
        assert_close(load_file(tmp_path / f"by{size}" / "model.safetensors"), alone, 1e-6)


def test_each_expert_counts_the_tokens_it_was_given(tmp_path, data):
    folder = save(qwen_moe(), tmp_path / "moe")
    captured = api.capture(folder, data, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    layer = "model.layers.0.mlp.experts"
    counts = {e: captured.counts[f"{layer}.{e}.gate_proj.weight"] for e in range(4)}
    assert sum(counts.values()) == 2 * captured.tokens
    for expert in range(4):
        for name in ("up_proj", "down_proj"):
            assert captured.counts[f"{layer}.{expert}.{name}.weight"] == counts[expert]
        assert torch.equal(found[f"{layer}.{expert}.gate_proj.weight"], found[f"{layer}.{expert}.up_proj.weight"])
    assert found[f"{layer}.0.down_proj.weight"].shape == (8, 8)
    assert "model.layers.0.mlp.gate.weight" not in found
    # each token goes to two experts, so their inputs together are the router's, twice
    router, _ = hooked_router(folder)
    together = sum(found[f"{layer}.{e}.gate_proj.weight"].double() * counts[e] for e in range(4))
    torch.testing.assert_close(together / 2, router, rtol=1e-5, atol=1e-4)


def hooked_router(folder: Path) -> tuple[Tensor, int]:
    model = in_float64(folder)
    rows: list[Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for text in TEXTS:
            model(token_ids(folder, text))
    x = torch.cat(rows)
    return x.T @ x, len(x)


def test_an_expert_that_no_token_reaches_is_zero_and_said_so(tmp_path):
    folder = save(qwen_moe(), tmp_path / "moe")
    captured = api.capture(folder, write_lines(tmp_path / "one.jsonl", {"text": "w1"}), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    unreached = [name for name, count in captured.counts.items() if count == 0]
    assert unreached
    assert not any(found[name].any() for name in unreached)
    assert "no token reached it" in captured.warnings[0]


def budgets(folder: Path, data: Path, tmp_path: Path, kind: str) -> tuple[int, int]:
    """A budget that takes all at once, and the least there can be."""
    need = api.capture(folder, data, tmp_path / "probe", fisher=kind == "fisher").memory
    shutil.rmtree(tmp_path / "probe")
    shapes = load_checkpoint(LocalStorage(), str(folder)).tensors.values()
    largest = 40 * 40 if kind == "covariance" else max(entry.elements for entry in shapes)
    return need[kind].peak, need[kind].fixed + 8 * largest


def test_passes_fit_the_budget_and_give_the_same_bytes(folder, data, tmp_path):
    most, least = budgets(folder, data, tmp_path, "covariance")
    plans = {}
    for budget in (most, (most + least) // 2, least):
        plans[budget] = api.capture(folder, data, tmp_path / str(budget), memory=budget).memory["covariance"]
        assert plans[budget].peak <= plans[budget].budget == budget
        assert digests(tmp_path / str(budget)) == digests(tmp_path / str(most))
    passes = [len(plan.sums) for plan in plans.values()]
    assert passes[0] == 1 < passes[1] < passes[2]
    with pytest.raises(StreamMergeError, match="capturing the covariance needs") as refused:
        api.capture(folder, data, tmp_path / "small", memory=least - 1)
    assert "--memory" in refused.value.hint
    assert not list(tmp_path.glob("small*"))


def test_the_matrices_that_read_one_input_are_summed_once(folder, data, tmp_path):
    memory = api.capture(folder, data, tmp_path / "out").memory["covariance"]
    # for each layer: q, k and v; o; gate and up; down
    assert memory.sums == (8 * 2 * (3 * 16**2 + 40**2),)
    found = load_file(tmp_path / "out" / "model.safetensors")
    q, k, v = (found[f"model.layers.0.{name}.weight"] for name in ATTENTION)
    assert torch.equal(q, k)
    assert torch.equal(q, v)


def exact_fisher(folder: Path, samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """By autograd in float64, sample by sample."""
    model = in_float64(folder)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for ids, first in samples:
        model.zero_grad()
        scores = model(ids).logits[0].log_softmax(-1)
        sum(scores[i - 1, ids[0, i]] for i in range(first, ids.shape[1])).backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad.square()
    return {name: total / len(samples) for name, total in sums.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_fisher_is_autograds_per_sample(kind, tmp_path, likely):
    folder = save(MODELS[kind](), tmp_path / kind)
    api.capture(folder, likely, tmp_path / "out", fisher=True)
    expected = exact_fisher(folder, [(token_ids(folder, text), 1) for text in TEXTS if " " in text])
    stored = load_checkpoint(LocalStorage(), str(folder)).tensors
    assert_close(load_file(tmp_path / "out" / "fisher" / "model.safetensors"), expected, 1e-4)
    checkpoint = load_checkpoint(LocalStorage(), str(tmp_path / "out" / "fisher"))
    assert {n: e.shape for n, e in checkpoint.tensors.items()} == {n: e.shape for n, e in stored.items()}
    facts = checkpoint.config["streammerge"]
    assert (facts["kind"], facts["samples"], facts["tokens"]) == ("fisher", 7, 56)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "fisher", "model.safetensors"]


def test_the_fisher_of_stacked_experts_lies_in_their_matrices(tmp_path, likely):
    folder = save(qwen_moe(), tmp_path / "moe")
    api.capture(folder, likely, tmp_path / "out", fisher=True)
    found = load_file(tmp_path / "out" / "fisher" / "model.safetensors")
    assert {n: t.shape for n, t in found.items()} == {
        n: t.shape for n, t in load_file(folder / "model.safetensors").items()
    }
    exact = exact_fisher(folder, [(token_ids(folder, text), 1) for text in TEXTS if " " in text])
    layer = "model.layers.1.mlp.experts"
    for expert, both in enumerate(exact[f"{layer}.gate_up_proj"]):
        gate, up = (found[f"{layer}.{expert}.{name}_proj.weight"].double() for name in ("gate", "up"))
        torch.testing.assert_close(torch.cat([gate, up]), both, rtol=1e-3, atol=1e-6)


def test_the_fishers_passes_give_the_same_bytes(folder, likely, tmp_path):
    most, least = budgets(folder, likely, tmp_path, "fisher")
    for budget in (most, least):
        memory = api.capture(folder, likely, tmp_path / str(budget), fisher=True, memory=budget).memory
        assert memory["fisher"].peak <= budget
        assert (len(memory["fisher"].sums) > 1) == (budget == least)
    one, many = (digests(tmp_path / str(budget) / "fisher") for budget in (most, least))
    assert one == many


def test_only_a_completion_is_scored_and_all_of_it_is_read(folder, tmp_path):
    prompt, completion = words(30, 6) + " ", words(31, 5)
    path = write_lines(tmp_path / "pairs.jsonl", {"prompt": prompt, "completion": completion})
    captured = api.capture(folder, path, tmp_path / "out", fisher=True)
    ids = token_ids(folder, prompt + completion)
    assert captured.tokens == ids.shape[1] == 11
    assert_close(load_file(tmp_path / "out" / "fisher" / "model.safetensors"), exact_fisher(folder, [(ids, 6)]), 1e-4)


def test_messages_go_through_the_template_and_the_last_answer_is_scored(tmp_path):
    folder = save(llama(), tmp_path / "chat", template=TEMPLATE)
    talk = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5"}]
    path = write_lines(tmp_path / "chat.jsonl", {"messages": talk})
    api.capture(folder, path, tmp_path / "out", fisher=True)
    ids = token_ids(folder, "user w1 w2 w3 assistant w4 w5")
    assert_close(load_file(tmp_path / "out" / "fisher" / "model.safetensors"), exact_fisher(folder, [(ids, 5)]), 1e-4)


class _StoppedError(Exception):
    pass


def stopped_after(moment: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        nonlocal moment
        moment -= 1
        if moment < 0:
            raise _StoppedError

    return progress


@pytest.mark.parametrize(("kind", "moment"), [("covariance", 0), ("covariance", 7), ("fisher", 20), ("fisher", 40)])
def test_a_capture_that_was_stopped_resumes_to_the_same_bytes(folder, likely, tmp_path, kind, moment, monkeypatch):
    monkeypatch.setattr(write, "GROUP_BYTES", 2000)
    least = budgets(folder, likely, tmp_path, kind)[1]
    options: dict[str, Any] = {"fisher": kind == "fisher", "memory": least}
    whole: list[int] = []
    api.capture(folder, likely, tmp_path / "whole", progress=lambda _, total: whole.append(total), **options)
    with pytest.raises(_StoppedError):
        api.capture(folder, likely, tmp_path / "out", progress=stopped_after(moment), **options)
    assert not (tmp_path / "out").exists()
    # before anything was finished nothing is left
    assert (tmp_path / "out.partial").exists() == (moment > 0)
    rest: list[int] = []
    api.capture(folder, likely, tmp_path / "out", resume=True, progress=lambda _, total: rest.append(total), **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert len(rest) == len(whole) if moment == 0 else len(rest) < len(whole)


def _capture_and_die(folder: Path, data: Path, out: Path, moment: int) -> None:
    write.GROUP_BYTES = 2000
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > moment:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync
    torch.set_num_threads(1)
    api.capture(folder, data, out, fisher=True)


@pytest.mark.parametrize("moment", [4, 9, 14])
def test_a_capture_that_was_killed_resumes_to_the_same_bytes(folder, likely, tmp_path, moment):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        api.capture(folder, likely, tmp_path / "whole", fisher=True)
        process = multiprocessing.get_context("forkserver").Process(
            target=_capture_and_die, args=(folder, likely, tmp_path / "out", moment)
        )
        process.start()
        process.join(50)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        api.capture(folder, likely, tmp_path / "out", fisher=True, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("facts", [{}, {"tokens": "many"}, {"tokens": float("nan")}])
def test_a_journal_that_does_not_count_its_tokens_is_refused(folder, likely, tmp_path, monkeypatch, facts):
    monkeypatch.setattr(write, "GROUP_BYTES", 2000)
    least = budgets(folder, likely, tmp_path, "covariance")[1]
    with pytest.raises(_StoppedError):
        api.capture(folder, likely, tmp_path / "out", memory=least, progress=stopped_after(7))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    first, *lines = journal.read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    assert changed
    for line in changed:
        line["outcome"]["facts"] = facts
    journal.write_text("\n".join([first, *map(json.dumps, changed), ""]))
    with pytest.raises(OutputError, match=r"does not say of how many tokens `.*` is") as caught:
        api.capture(folder, likely, tmp_path / "out", memory=least, resume=True)
    assert caught.value.hint == "Delete that folder and capture again."


@pytest.mark.parametrize("change", ["data", "model", "options", "fisher"])
def test_what_was_captured_of_other_inputs_is_not_resumed(folder, data, likely, tmp_path, change, monkeypatch):
    monkeypatch.setattr(write, "GROUP_BYTES", 2000)
    least = budgets(folder, likely, tmp_path, "covariance")[1]
    with pytest.raises(_StoppedError):
        api.capture(folder, likely, tmp_path / "out", memory=least, progress=stopped_after(7))
    if change == "data":
        likely = data
    elif change == "model":
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t * 2 for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"options": {"batch_size": 2}, "fisher": {"fisher": True}}.get(change, {})
    with pytest.raises(OutputError, match="was begun with other inputs"):
        api.capture(folder, likely, tmp_path / "out", resume=True, **options)
    with pytest.raises(OutputError, match="interrupted"):
        api.capture(folder, likely, tmp_path / "out")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "w1"}\n{"text": \n', "data.jsonl:2` does not hold readable JSON"),
        (b'{"text": "\xff\xfe"}\n', "data.jsonl:1` does not hold readable JSON"),
        (b'{"text": "w1"}\n{"text": "  "}\n', "data.jsonl:2` is empty"),
        (b'{"text": 3}\n', "data.jsonl:1` is no sample"),
        (b'["w1"]\n', "data.jsonl:1` is no sample"),
        (b'{"prompt": "w1"}\n', "data.jsonl:1` is no sample"),
        (b'{"messages": [{"role": "user"}]}\n', "data.jsonl:1` is no sample"),
        (b'{"messages": [{"role": "user", "content": "w1"}]}\n', "has no chat template"),
        (b" \n\n", "holds no samples"),
        (b"", "holds no samples"),
        (b'{"text": "' + b"w1 " * 80 + b'"}\n', "reads 64 tokens at most"),
    ],
)
def test_data_that_cannot_be_read_is_an_error_with_a_hint(folder, tmp_path, lines, message):
    (tmp_path / "data.jsonl").write_bytes(lines)
    with pytest.raises(StreamMergeError, match=message) as refused:
        api.capture(folder, tmp_path / "data.jsonl", tmp_path / "out")
    assert refused.value.hint
    assert not list(tmp_path.glob("out*"))


def test_a_long_line_is_an_error_before_it_is_read(folder, tmp_path, data, monkeypatch):
    monkeypatch.setattr(samples, "LINE_LIMIT_BYTES", 40)
    with pytest.raises(StreamMergeError, match=r"data\.jsonl:4` is longer than"):
        api.capture(folder, write_lines(tmp_path / "data.jsonl", *[{"text": "w1"}] * 3, {"text": "w " * 40}), "out")


def test_a_chat_that_the_template_refuses_is_an_error(tmp_path):
    folder = save(llama(), tmp_path / "chat", template="{{ raise_exception('only users') }}")
    path = write_lines(tmp_path / "chat.jsonl", {"messages": [{"role": "system", "content": "w1"}]})
    with pytest.raises(StreamMergeError, match="does not fit the tokenizer's chat template: only users"):
        api.capture(folder, path, tmp_path / "out")


def test_a_sample_without_anything_to_predict_has_no_fisher(folder, data, tmp_path):
    with pytest.raises(StreamMergeError, match=r"data\.jsonl:7` leaves nothing to predict"):
        api.capture(folder, data, tmp_path / "out", fisher=True)
    assert not list(tmp_path.glob("out*"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None}))


def test_a_models_own_code_is_never_run(folder, data, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    api.capture(folder, data, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["EvilForCausalLM"]}, "no model that transformers builds"),
        ({"architectures": None}, "no model that transformers builds"),
        ({"hidden_size": 24}, "cannot be loaded|no model that transformers builds"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors of its architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
        ({"vocab_size": 32}, "32 token embeddings but its tokenizer yields"),
    ],
)
def test_a_model_that_cannot_be_run_is_an_error_with_a_hint(folder, data, tmp_path, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(StreamMergeError, match=message) as refused:
        api.capture(folder, data, tmp_path / "out")
    assert refused.value.hint
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_not_finite_are_an_error(folder, data, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        StreamMergeError, match=r"`model.layers.1.mlp.down_proj.weight` reads inputs that are not finite"
    ):
        api.capture(folder, data, tmp_path / "out")


def test_a_folder_without_a_tokenizer_is_an_error(folder, data, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(StreamMergeError, match="has no tokenizer"):
        api.capture(folder, data, tmp_path / "out")


def test_a_model_without_linear_layers_is_an_error(folder, data, tmp_path):
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if "proj" not in n}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StreamMergeError, match="has no linear layers"):
        api.capture(folder, data, tmp_path / "out")


def test_without_transformers_there_is_a_hint(folder, data, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StreamMergeError, match="`transformers` is not installed") as refused:
        api.capture(folder, data, tmp_path / "out")
    assert "streammerge[transformers]" in refused.value.hint


def test_the_command_says_what_it_did(folder, likely, tmp_path):
    arguments = ["capture", str(folder), "--data", str(likely), "-o", str(tmp_path / "out"), "--samples", "2"]
    done = CliRunner().invoke(cli, [*arguments, "--max-tokens", "4", "--fisher", "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["samples"], told["tokens"], told["matrices"]) == (2, 8, 14)
    assert told["memory"]["fisher"]["peak"] <= told["memory"]["fisher"]["budget"]
