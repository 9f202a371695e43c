"""Evaluating a merged folder: by the lm-evaluation-harness, or by any command."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import streammerge
from streammerge import api
from streammerge.errors import EvaluationError, RecipeError, StreamMergeError
from tests.models import recipe_of

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / ".cache" / "harness-venv" / "bin"


def python(program: str) -> str:
    """A command that runs a program on the model."""
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {{model}}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a model"
    folder.mkdir()
    return folder


def test_a_commands_last_line_is_the_result_and_lies_beside_the_model(model):
    said = api.evaluate(model, {"command": python('print(\'loading\'); print(\'{"acc": 0.5, "note": "x"}\')')})
    assert said == {"command": {"acc": 0.5}}
    assert json.loads((model / "results.json").read_text()) == {"tasks": said}


def test_a_command_may_write_its_results_to_a_file(model):
    program = "import json, sys; json.dump({'tasks': {'a': {'acc': 1}, 'b': {'f1': 0.25}}}, open(sys.argv[2], 'w'))"
    assert api.evaluate(model, {"command": python(program) + " {results}"}) == {"a": {"acc": 1.0}, "b": {"f1": 0.25}}


def test_a_command_is_told_the_folder_as_one_word_and_no_shell_reads_it(model):
    folder = model.with_name("a; touch hacked $(x)")
    model.rename(folder)
    program = (
        "import json, os, sys; print(json.dumps({'words': len(sys.argv), 'there': int(os.path.isdir(sys.argv[1]))}))"
    )
    assert api.evaluate(folder, {"command": python(program)}) == {"command": {"words": 2.0, "there": 1.0}}


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('no \\x1b[31mway')", r"exit code 1:\n  no \\x1b\[31mway"),
        ("print('acc 0.5')", "answered `acc 0.5`"),
        ("print('[1]')", "answered"),
        ("print('{}')", "answered"),
        ("pass", "answered ``"),
        ("print('{\"acc\": NaN}')", "gave no number"),
        ("import time; time.sleep(60)", "more than 1 seconds"),
    ],
)
def test_a_command_that_gives_no_result_is_an_error(model, program, message):
    with pytest.raises(EvaluationError, match=message):
        api.evaluate(model, {"command": python(program), "timeout_seconds": 1})
    assert not list(model.iterdir())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "names no harness"),
        ({"command": "x {model}", "tasks": ["a"]}, "names two harnesses"),
        ({"command": "x"}, "says nowhere what"),
        ({"command": "x '{model}"}, "split into words"),
        ({"tasks": []}, "at least one"),
        ({"tasks": ["a"], "limit": -1}, "0 or more"),
        ({"tasks": ["a"], "limt": 1}, "limt"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, asked, message):
    with pytest.raises(RecipeError, match=message):
        api.evaluate(model, asked)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StreamMergeError, match="is no folder"):
        api.evaluate(tmp_path / "nowhere", {"command": "x {model}"})


STAND_IN = """
import json, os
def simple_evaluate(**asked):
    asked["task_manager"] = asked["task_manager"].include_path
    asked["offline"] = os.environ.get("HF_HUB_OFFLINE")
    with open(os.environ["ASKED"], "w") as file:
        json.dump(asked, file)
    return {"results": {"toy": {"alias": "toy", "acc,none": 0.75, "acc_stderr,none": "N/A", "f1,strict": 0.5}}}
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that notes what the harness is asked; what it answers has the harness's form."""
    package = tmp_path / "packages" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    manager = "class TaskManager:\n    def __init__(self, include_path):\n        self.include_path = include_path\n"
    (package / "tasks.py").write_text(manager)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.json"))
    return tmp_path / "asked.json"


def test_the_harness_is_asked_what_the_user_asks(model, stand_in):
    asked = {
        "tasks": ["toy", "other"], "include_path": str(model), "limit": 3, "num_fewshot": 0, "batch_size": 2,
        "dtype": "float32", "device": "cpu", "apply_chat_template": True, "offline": True,
    }  # fmt: skip
    assert api.evaluate(model, asked) == {"toy": {"acc": 0.75, "f1,strict": 0.5}}
    assert json.loads(stand_in.read_text()) == {
        "model": "hf", "model_args": {"pretrained": str(model), "dtype": "float32"}, "tasks": ["toy", "other"],
        "task_manager": str(model), "num_fewshot": 0, "limit": 3, "batch_size": 2, "device": "cpu",
        "apply_chat_template": True, "bootstrap_iters": 0, "log_samples": False, "offline": "1",
    }  # fmt: skip


def test_a_missing_harness_is_told_with_what_to_install(model, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(EvaluationError, match="has no lm-evaluation-harness") as error:
        api.evaluate(model, {"tasks": ["toy"], "python": sys.executable})
    assert "pip install" in str(error.value.hint)


def test_an_interpreter_that_is_not_there_is_told(model):
    with pytest.raises(EvaluationError, match="cannot be run: no such file"):
        api.evaluate(model, {"tasks": ["toy"], "python": "/nowhere/python"})


WORDS = ("[UNK]", "[EOS]", "question", "answer", "red", "green", "blue", "one", "two", "three", ":", "?")


def save_llamas(folder: Path) -> dict[str, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return {name: folder / name for name in ("base", "one", "two")}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]")
    fast.save_pretrained(folder)


def write_task(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"question": q, "choices": ["red", "green blue", "one"], "answer": i % 3} for i, q in enumerate(WORDS)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "toy.yaml").write_text(f"""task: sm_toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.json"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "question : {{{{question}}}} ? answer :"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
""")
    return folder


@pytest.mark.harness
def test_the_harness_scores_a_merged_model_the_same_by_every_way(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    family = save_llamas(tmp_path)
    save_tokenizer(family["base"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(family)))
    streammerge.merge(recipe, tmp_path / "out")
    tasks = write_task(tmp_path / "tasks")

    asked = {"tasks": ["sm_toy"], "include_path": str(tasks), "offline": True, "dtype": "float32"}
    by_us = api.evaluate(tmp_path / "out", {**asked, "python": str(HARNESS / "python")})
    assert 0.0 <= by_us["sm_toy"]["acc"] <= 1.0

    def by_command_line(words: list[str], arguments: str, out: Path) -> float:
        command = [*words, "run", "--model", "hf" if "pretrained" in arguments else "streammerge",
                   "--model_args", arguments, "--tasks", "sm_toy", "--include_path", str(tasks), "--device", "cpu",
                   "--batch_size", "8", "--output_path", str(out)]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (results,) = out.rglob("results_*.json")
        return float(json.loads(results.read_text())["results"]["sm_toy"]["acc,none"])

    plain = by_command_line([str(HARNESS / "lm-eval")], f"pretrained={tmp_path / 'out'},dtype=float32", tmp_path / "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    launcher = [str(HARNESS / "python"), "-m", "streammerge.lm_eval"]
    merged = by_command_line(launcher, f"recipe={recipe},dtype=float32", tmp_path / "2")
    assert by_us["sm_toy"]["acc"] == plain == merged
