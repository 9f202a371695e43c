"""Experts with tokens of their own merge by token, and the output's tokenizer, config and matrices agree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge import models as opened
from streammerge import vocabulary
from streammerge.checkpoint import Checkpoint, FileFacts, TensorEntry
from streammerge.cli import cli
from streammerge.derived import DerivedEntry
from streammerge.device_stream import DeviceStream
from streammerge.errors import CheckpointError, OutputError, PlanError, RecipeError, StreamMergeError
from streammerge.plan import make_plan
from streammerge.recipe import Recipe
from streammerge.row_maps import MEAN, PADDING, PIECE_ELEMENTS, ZERO, MappedRows, Segments
from streammerge.storage.local import LocalStorage
from streammerge.stream import Stream
from streammerge.tokenizer import parse_tokenizer
from tests.stored import digests, streamed, tensors_of
from tests.test_derived import scaled
from tests.vocabularies import HIDDEN, Family, ids_of, save

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / name).read_text())
    return read


def by_rule(family: Family, names: Sequence[str], name: str, ids: Mapping[str, int], rows: int, table: str) -> Tensor:
    """The rows that a model gives to the output, [rows, HIDDEN] float64, token by token as the rules say."""
    stored = {each: family.tensors(each)[table].double() for each in names}
    dtype = family.tensors(name)[table].dtype
    given = torch.full((rows, HIDDEN), torch.nan, dtype=torch.float64)
    for token, place in ids.items():
        having = [each for each in names if token in family.ids[each]]
        if token in family.ids[name]:
            having = [name]
        elif "base" in having:
            having = ["base"]
        given[place] = torch.stack([stored[each][family.ids[each][token]] for each in having]).mean(0).to(dtype)
    # what no token has: the mean of what tokens have
    given[given.isnan().any(1)] = given[~given.isnan().any(1)].mean(0)
    return given


def linear_of(folder: Path, *experts: str) -> dict[str, object]:
    """The mean of models under a folder, beside its base."""
    models = [{"model": str(folder / name)} for name in experts]
    return {"merge_method": "linear", "base_model": str(folder / "base"), "models": models}


def merged(recipe: Mapping[str, object], out: Path, **options: Any) -> dict[str, Tensor]:
    streammerge.merge(recipe, out, **options)
    return tensors_of(out)


# rows


@pytest.mark.parametrize("table", [EMBEDDING, HEAD])
@pytest.mark.parametrize("multiple", [None, 16])
def test_each_tokens_row_is_what_the_rule_says(family, table, multiple, tmp_path):
    tokenizer = {"source": "union", **({"pad_to_multiple_of": multiple} if multiple else {})}
    found = merged(family.recipe(tokenizer=tokenizer), tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    rows = 48 if multiple else len(ids)
    names = ("base", "a", "b", "c")
    given = {name: by_rule(family, names, name, ids, rows, table) for name in names}
    expected = given["a"] + given["b"] + given["c"] - 2 * given["base"]
    torch.testing.assert_close(found[table].double(), expected, rtol=0, atol=3e-7)
    assert found[table].shape == (rows, HIDDEN)


def test_a_token_that_only_one_expert_has_keeps_its_row(family, tmp_path):
    for method in ("task_arithmetic", "linear", "ties"):
        out = tmp_path / method
        found = merged(family.recipe(method, tokenizer_source="union"), out)[EMBEDDING]
        for name, token in (("a", "<A>"), ("b", "<B>"), ("c", "<C>")):
            row = family.tensors(name)[EMBEDDING][family.ids[name][token]]
            torch.testing.assert_close(found[ids_of(out)[token]], row, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("source", ["base", "a", "c"])
def test_the_output_may_have_one_models_vocabulary(family, source, tmp_path):
    found = merged(family.recipe(tokenizer_source="base" if source == "base" else family[source]), tmp_path / "out")
    assert ids_of(tmp_path / "out") == family.ids[source]
    assert found[HEAD].shape[0] == len(family.ids[source]) == config_of(tmp_path / "out")["vocab_size"]
    names = ("base", "a", "b", "c")
    given = {n: by_rule(family, names, n, family.ids[source], len(family.ids[source]), HEAD) for n in names}
    expected = given["a"] + given["b"] + given["c"] - 2 * given["base"]
    torch.testing.assert_close(found[HEAD].double(), expected, rtol=0, atol=3e-7)


def test_without_a_base_a_missing_row_is_the_mean_of_the_others(family, tmp_path):
    recipe = {**family.recipe("linear", tokenizer_source="union"), "base_model": None}
    found = merged(recipe, tmp_path / "out")[EMBEDDING]
    ids = ids_of(tmp_path / "out")
    given = [by_rule(family, "abc", name, ids, len(ids), EMBEDDING) for name in "abc"]
    torch.testing.assert_close(found.double(), torch.stack(given).mean(0), rtol=0, atol=3e-7)


@pytest.mark.parametrize("method", ["linear", "ties", "actmat", "model_stock", "dare_ties", "task_arithmetic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_method_merges_what_models_with_those_rows_would_hold(method, dtype, tmp_path):
    family = Family(tmp_path / "family", dtype=dtype)
    parameters = {"density": 0.5} if method in ("ties", "dare_ties") else {}
    options = {"parameters": parameters, "seed": 3, "out_dtype": "float32"}
    tokenizer = {"source": "union", "pad_to_multiple_of": 8}
    found = merged(family.recipe(method, tokenizer=tokenizer, **options), tmp_path / "out", memory="256MiB")
    ids, rows = ids_of(tmp_path / "out"), found[HEAD].shape[0]
    names = ("base", "a", "b", "c")
    for name in names:
        tables = {t: by_rule(family, names, name, ids, rows, t).to(dtype) for t in (EMBEDDING, HEAD)}
        tensors = {**family.tensors(name), **tables}
        folder = tmp_path / "whole" / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
        shutil.copy(family.folder / name / "config.json", folder)
    whole = {"base_model": str(tmp_path / "whole" / "base")}
    recipe = family.recipe(method, **options) | whole
    recipe["models"] = [
        {**each, "model": str(tmp_path / "whole" / Path(each["model"]).name)} for each in recipe["models"]
    ]
    expected = merged(recipe, tmp_path / "expected", memory="256MiB")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_tied_models_have_one_matrix(tmp_path):
    family = Family(tmp_path / "family", tied=True)
    found = merged(family.recipe(tokenizer_source="union"), tmp_path / "out")
    assert HEAD not in found
    assert found[EMBEDDING].shape[0] == 34 == config_of(tmp_path / "out")["vocab_size"]


def test_head_biases_have_the_vocabularys_rows_too(tmp_path):
    family = Family(tmp_path)
    for number, (name, ids) in enumerate(family.ids.items()):
        file = tmp_path / name / "model.safetensors"
        rows = load_file(file)[HEAD].shape[0]
        bias = torch.arange(rows, dtype=torch.float32) + 100 * number
        save_file({**load_file(file), "lm_head.bias": bias, "final_logits_bias": bias[None] + 0.5}, file)
        assert len(ids) <= rows
    found = merged(family.recipe(tokenizer_source="union", experts="a"), tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    assert found["lm_head.bias"].tolist() == [100.0 + family.ids["a"][token] for token in sorted(ids, key=ids.get)]
    assert torch.equal(found["final_logits_bias"], found["lm_head.bias"][None] + 0.5)


def test_position_tables_keep_their_rows(tmp_path):
    family = Family(tmp_path)
    for name in family.ids:
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        # as many as the base has tokens
        save_file({**tensors, "model.embed_positions.weight": torch.zeros(len(family.ids["base"]), 4)}, file)
    found = merged(family.recipe(tokenizer_source="union"), tmp_path / "out")
    assert found["model.embed_positions.weight"].shape == (len(family.ids["base"]), 4)


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        # of a model that also speaks: its talker's codes are a vocabulary of their own
        (
            {"model.embed_tokens.weight": (90, 4), "talker.embed_tokens.weight": (40, 4), "lm_head.weight": (90, 4)},
            {"text_config": {"vocab_size": 90}, "talker_config": {"vocab_size": 40}},
            (90, {"model.embed_tokens.weight", "lm_head.weight"}),
        ),
        # positions that outnumber tokens
        (
            {"wte.weight": (50, 4), "wpe.weight": (64, 4), "h.0.ln_1.bias": (50,)},
            {"vocab_size": 50},
            (50, {"wte.weight"}),
        ),
        (
            {
                "bert.embeddings.word_embeddings.weight": (70, 4),
                "bert.embeddings.position_embeddings.weight": (70, 4),
                "bert.embeddings.token_type_embeddings.weight": (70, 4),
                "cls.predictions.bias": (70,),
                "cls.predictions.transform.dense.bias": (70,),
                "cls.predictions.decoder.weight": (70, 4),
                "cls.predictions.decoder.bias": (70,),
            },
            {"vocab_size": 70},
            (
                70,
                {
                    "bert.embeddings.word_embeddings.weight",
                    "cls.predictions.bias",
                    "cls.predictions.decoder.weight",
                    "cls.predictions.decoder.bias",
                },
            ),
        ),
        (
            {"shared.weight": (30, 4), "encoder.block.0.relative_attention_bias.weight": (32, 4)},
            {},
            (30, {"shared.weight"}),
        ),
        ({"norm.weight": (4,)}, {"vocab_size": 4}, (0, set())),
    ],
    ids=["talker", "gpt2", "bert", "t5", "none"],
)
def test_the_tables_of_tokens_are_told_from_others(tensors, config, expected):
    entries = {name: TensorEntry(name, "F32", shape, "f", 0, 0) for name, shape in tensors.items()}
    model = Checkpoint(location="m", tensors=entries, config=config, files={}, header_sha256={})
    rows, names = vocabulary.vocabulary_tensors(model)
    assert (rows, set(names)) == expected


def test_a_plan_tells_how_many_rows_and_new_tokens_there_are(family, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(family.recipe(tokenizer_source="union")))
    shown = CliRunner().invoke(cli, ["plan", str(tmp_path / "recipe.yaml")]).output
    assert "  tokens    34 rows; 5 tokens added\n" in shown


# rules for single tokens


def test_rules_say_whose_row_a_token_has(family, tmp_path):
    tokens = {
        "<A>": {"source": "zero"},
        "<S>": {"source": family["b"], "force": True},
        "<T>": {"source": family["c"]},
        "<B>": {"source": {"kind": "model_token", "model": family["a"], "token": "the"}},
        "<C>": {"source": {"kind": "model_token", "model": family["a"], "token_id": 3}, "force": True},
        "the": {"source": {"kind": "zero"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": family["c"], "token": "cat"}},
    }
    found = merged(family.recipe(tokenizer={"source": "union", "tokens": tokens}), tmp_path / "out")[EMBEDDING]
    ids = ids_of(tmp_path / "out")

    def row(name: str, token: str) -> Tensor:
        return family.tensors(name)[EMBEDDING][family.ids[name][token]]

    expected = {
        # to models that lack it, the base among them: nothing, so that the change of `a` is all of its row
        "<A>": row("a", "<A>"),
        "<S>": row("b", "<S>"),
        "<T>": row("a", "<T>") + row("b", "<T>") - row("c", "<T>"),
        "<B>": row("b", "<B>"),
        "<C>": family.tensors("a")[EMBEDDING][3],
        "the": torch.zeros(HIDDEN),
        "<new>": row("c", "cat"),
    }
    for token, wanted in expected.items():
        torch.testing.assert_close(found[ids[token]], wanted, rtol=0, atol=5e-7, msg=token)


def test_a_token_of_an_expert_may_join_the_bases_vocabulary(family, tmp_path):
    tokenizer = {"source": "base", "tokens": {"<T>": {"source": family["c"]}}}
    found = merged(family.recipe(tokenizer=tokenizer), tmp_path / "out")[EMBEDDING]
    assert ids_of(tmp_path / "out") == {**family.ids["base"], "<T>": 29}
    assert found.shape[0] == 30
    (entry,) = [e for e in config_of(tmp_path / "out", "tokenizer.json")["added_tokens"] if e["content"] == "<T>"]
    # as the first model that adds it has it
    assert not entry["special"]
    assert entry["normalized"]


# what lies beside the weights


@pytest.mark.parametrize("source", ["union", "base", "a"])
def test_transformers_loads_the_output_and_every_id_has_a_row(family, source, tmp_path):
    import transformers

    wanted = family[source] if source == "a" else source
    streammerge.merge(family.recipe("linear", tokenizer_source=wanted), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    assert tokenizer.get_vocab() == ids
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    text = "the cat sat<S>the dog<A>ran<T>a mat<C>"
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert max(encoded) < model.config.vocab_size
    for token in ("<S>", "<A>", "<T>", "<C>"):
        assert (ids.get(token) in encoded) == (token in ids)
    assert model(torch.tensor([encoded])).logits.isfinite().all()
    assert tokenizer.eos_token_id == model.config.eos_token_id == ids["</s>"]


def test_one_expert_answers_as_before_at_its_own_tokens(family, tmp_path):
    import transformers

    streammerge.merge(family.recipe("linear", experts="b", tokenizer_source="union"), tmp_path / "out")
    logits = {}
    for folder in (tmp_path / "out", family.folder / "b"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        encoded = tokenizer("the cat<B>sat on<S>a mat<T>", return_tensors="pt", add_special_tokens=False)
        ids = tokenizer.get_vocab()
        found = model(encoded["input_ids"]).logits[0]
        logits[folder] = found[:, [ids[token] for token in sorted(family.ids["b"])]]
    torch.testing.assert_close(*logits.values())


def test_an_added_token_keeps_what_its_tokenizer_says_of_it(tmp_path):
    odd = {"content": "<odd>", "special": True, "lstrip": True, "normalized": False}
    for seed, (name, added) in enumerate({"base": [], "a": ["<a>"], "b": [odd]}.items()):
        save(tmp_path / name, seed, added)
    for name in ("base", "a", "b"):
        file = tmp_path / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": {}}))
        (tmp_path / name / "added_tokens.json").write_text("{}")
        (tmp_path / name / "special_tokens_map.json").write_text('{"additional_special_tokens": []}')
    streammerge.merge(linear_of(tmp_path, "a", "b") | {"tokenizer_source": "union"}, tmp_path / "out")
    flags = {"lstrip": True, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    table = config_of(tmp_path / "out", "tokenizer.json")["added_tokens"]
    assert table[-1] == {"id": 30, "content": "<odd>", **flags}
    decoder = config_of(tmp_path / "out", "tokenizer_config.json")["added_tokens_decoder"]
    assert decoder["30"] == {"content": "<odd>", **flags}
    assert config_of(tmp_path / "out", "added_tokens.json") == {"<a>": 29, "<odd>": 30}
    assert config_of(tmp_path / "out", "special_tokens_map.json") == {"additional_special_tokens": ["<odd>"]}


def test_ids_in_configs_follow_the_tokenizer(tmp_path):
    save(tmp_path / "base", 0)
    ids = save(tmp_path / "other", 1, ["<x>"], special=("</s>", "<unk>", "<s>"))
    found = merged(linear_of(tmp_path, "other") | {"tokenizer_source": str(tmp_path / "other")}, tmp_path / "out")
    assert torch.equal(found[HEAD], tensors_of(tmp_path / "other")[HEAD])
    config, generation = config_of(tmp_path / "out"), config_of(tmp_path / "out", "generation_config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 0, 0)
    assert generation == {"eos_token_id": [0], "bos_token_id": ids["<s>"]}
    assert config["vocab_size"] == len(ids)


def test_a_config_inside_has_the_new_size_unless_it_is_of_another_vocabulary():
    from streammerge.tokenizer_files import config_with

    made = vocabulary.Vocabulary(
        rows=40, before=32, location="x", added={}, renumbered={1: 7, 2: None, 3: 3}, digest=""
    )
    config = {
        "text_config": {"vocab_size": 32, "eos_token_id": [1, 2], "pad_token_id": 2},
        "talker": {"vocab_size": 9, "eos_token_id": 1},
        "image_token_id": 1,
        "image_token_index": 31,
        "forced_bos_token_id": 2,
        "pad_token_id": -1,
        "sep_token_id": None,
        "hidden_size": 1,
    }
    assert config_with(made, config, {"text_config": {"pad_token_id": 5}}) == {
        "text_config": {"vocab_size": 40, "eos_token_id": [7], "pad_token_id": 5},
        "talker": {"vocab_size": 9, "eos_token_id": 1},
        "image_token_id": 7,
        "image_token_index": 31,
        "forced_bos_token_id": None,
        "pad_token_id": -1,
        "sep_token_id": None,
        "hidden_size": 1,
    }


# one vocabulary already


def test_equal_tokenizers_are_not_even_parsed(tmp_path, monkeypatch):
    for seed, name in enumerate(("base", "a")):
        save(tmp_path / name, seed, ["<x>"], padding=3)
    monkeypatch.setattr(vocabulary, "parse_tokenizer", None)
    recipe = linear_of(tmp_path, "a")
    for source in ("base", "union", str(tmp_path / "a")):
        plan = streammerge.plan(recipe | {"tokenizer_source": source})
        assert plan.vocabulary is None
        assert plan.layout == streammerge.plan(recipe).layout


def test_tokenizers_that_differ_in_other_things_than_tokens_change_nothing(tmp_path):
    for seed, name in enumerate(("base", "a")):
        save(tmp_path / name, seed, ["<x>"], padding=3)
    file = tmp_path / "a" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": None}))
    recipe = linear_of(tmp_path, "a")
    assert streammerge.plan(recipe | {"tokenizer_source": "union"}).vocabulary is None


def test_rows_that_pad_are_cut_where_models_pad_otherwise(tmp_path):
    ids = save(tmp_path / "base", 0, padding=3)
    save(tmp_path / "a", 1, padding=7)
    recipe = linear_of(tmp_path, "a")
    with pytest.raises(PlanError) as caught:
        streammerge.plan(recipe)
    assert "`tokenizer_source: union`" in str(caught.value.hint)
    found = merged(recipe | {"tokenizer_source": "base"}, tmp_path / "out")
    assert torch.equal(found[EMBEDDING], tensors_of(tmp_path / "a")[EMBEDDING][: len(ids)])


def test_a_model_without_a_tokenizer_has_the_bases(tmp_path):
    family = Family(tmp_path)
    save(tmp_path / "plain", 9)
    (tmp_path / "plain" / "tokenizer.json").unlink()
    recipe = family.recipe("linear", tokenizer_source="union")
    recipe["models"] = [{"model": family[name]} for name in ("a", "plain")]
    found = merged(recipe, tmp_path / "out")[EMBEDDING]
    ids = ids_of(tmp_path / "out")
    wanted = (tensors_of(tmp_path / "plain")[EMBEDDING][17] + family.tensors("a")[EMBEDDING][17]) / 2
    torch.testing.assert_close(found[ids["the"]], wanted)


def test_words_and_added_tokens_in_files_of_their_own_are_read(tmp_path):
    family = Family(tmp_path)
    for name in ("a", "b"):
        table = config_of(tmp_path / name, "tokenizer.json")
        added = {each["content"]: each["id"] for each in table["added_tokens"] if each["id"] > 2}
        (tmp_path / name / "vocab.json").write_text(json.dumps(table["model"]["vocab"]))
        (tmp_path / name / "added_tokens.json").write_text(json.dumps(added))
    expected = merged(family.recipe(tokenizer_source="union"), tmp_path / "expected")
    for name in ("a", "b"):
        (tmp_path / name / "tokenizer.json").unlink()
    found = merged(family.recipe(tokenizer_source="union"), tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tokenizer = {"source": family["a"], "tokens": {"<n>": {"source": "zero"}}}
    with pytest.raises(PlanError, match=r"to be added to the tokenizer of `.*a`, which has no `tokenizer\.json`"):
        streammerge.plan(family.recipe(tokenizer=tokenizer))


# the engine


def test_an_interrupted_merge_goes_on_with_the_same_bytes(family, tmp_path):
    recipe = family.recipe(tokenizer={"source": "union", "pad_to_multiple_of": 64})
    streammerge.merge(recipe, tmp_path / "whole")

    def stop(done: int, _: int) -> None:
        if done > 8000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(recipe, tmp_path / "out", progress=stop)
    streammerge.merge(recipe, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_merge_is_not_resumed_with_other_rows_for_the_same_tokens(tmp_path):
    family = Family(tmp_path / "family")

    def stop(done: int, _: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(family.recipe(tokenizer_source="union"), tmp_path / "out", progress=stop)
    file = Path(family["c"]) / "tokenizer.json"
    # the union is the same, and so is every other file of the output
    text = file.read_text().replace("<S>", "<?>").replace("<C>", "<S>").replace("<?>", "<C>")
    file.write_text(text)
    with pytest.raises(OutputError, match="vocabulary"):
        streammerge.merge(family.recipe(tokenizer_source="union"), tmp_path / "out", resume=True)


def test_verify_merges_such_tensors_again(family, tmp_path):
    recipe = family.recipe("ties", tokenizer={"source": "union", "pad_to_multiple_of": 16})
    streammerge.merge(recipe, tmp_path / "out")
    found = streammerge.verify(tmp_path / "out", inputs=True, recompute=50)
    assert found.problems == ()
    assert {EMBEDDING, HEAD} <= {each.name for each in found.recomputed}
    # and its report is a recipe that does the same again
    streammerge.merge(tmp_path / "out" / "streammerge.json", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_a_device_stream_reads_them_too(family, tmp_path):
    recipe = Recipe.from_dict(family.recipe("linear", tokenizer={"source": "union", "pad_to_multiple_of": 16}))
    storage = LocalStorage()
    expected, _ = streamed(Stream(make_plan(recipe, storage, memory_bytes=1 << 28), storage))
    plan = make_plan(recipe, storage, memory_bytes=1 << 30, device="cpu", device_memory_bytes=1 << 30)
    assert streamed(DeviceStream(plan, storage))[0] == expected


def test_mapped_files_give_the_same_rows(family, tmp_path):
    recipe = family.recipe(tokenizer={"source": "union", "pad_to_multiple_of": 16})
    found = merged(recipe, tmp_path / "mapped", storage=LocalStorage(mapped=True))
    expected = merged(recipe, tmp_path / "read")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_tensors_that_are_derived_already_give_rows_to_other_models(family, tmp_path, monkeypatch):
    """A view of one model, such as a dequantised one: its rows are computed from its own folder for others too."""

    def view(model: Checkpoint) -> Checkpoint:
        if model.location != family["a"]:
            return model
        tensors = {name: scaled(entry, 2.0) for name, entry in model.tensors.items()}
        return replace(model, tensors=tensors)

    doubled = Family(tmp_path / "family")
    file = Path(doubled["a"]) / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    tokenizer = {"source": "union", "pad_to_multiple_of": 16}
    expected = merged(doubled.recipe(tokenizer=tokenizer), tmp_path / "expected")
    monkeypatch.setattr(opened, "VIEWS", (view,))
    found = merged(family.recipe(tokenizer=tokenizer), tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_planning_loads_no_torch(family):
    recipe = family.recipe(tokenizer_source="union")
    code = f"import sys, streammerge; streammerge.plan({recipe!r}); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_a_plan_counts_only_the_rows_that_are_read(family):
    plan = streammerge.plan(family.recipe(tokenizer_source="union"))
    stored = sum(tensor.nbytes for name in family.ids for tensor in family.tensors(name).values())
    assert plan.read_bytes < 1.25 * stored


def test_a_large_vocabulary_takes_seconds(tmp_path):
    tokens = 150_000
    for number, name in enumerate(("base", "a", "b", "c")):
        added = [f"<{(7 * number * each) % 1009}>" for each in range(200 if number else 0)]
        added = list(dict.fromkeys(added))
        (tmp_path / name).mkdir()
        vocab = {f"word {each}": each for each in range(tokens)}
        table = {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "word 0"}}
        table["added_tokens"] = [{"id": tokens + place, "content": token} for place, token in enumerate(added)]
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(table))
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": tokens + len(added)}))
        rows = torch.full((tokens + len(added), 4), float(number)).bfloat16()
        save_file({EMBEDDING: rows}, tmp_path / name / "model.safetensors")
    started = time.perf_counter()
    found = merged(linear_of(tmp_path, *"abc") | {"tokenizer_source": "union"}, tmp_path / "out")[EMBEDDING]
    assert time.perf_counter() - started < 30
    assert (found[:tokens] == 2.0).all()
    assert found.shape[0] == len(ids_of(tmp_path / "out"))


# the row maps by themselves


@st.composite
def row_maps(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int]:
    """For each row its source and the row there; then columns and how many rows the parts have."""
    stored = draw(st.integers(1, 6))
    row = st.one_of(
        st.tuples(st.integers(0, 1), st.integers(0, stored - 1)),
        st.just((ZERO, 0)),
        st.just((MEAN, 2)),
        st.just((PADDING, 0)),
    )
    return draw(st.lists(row, min_size=1, max_size=12)), draw(st.integers(1, 5)), stored


@settings(max_examples=200, deadline=None)
@given(row_maps(), st.data())
def test_any_run_of_mapped_rows_is_that_run_of_the_whole(drawn, data):
    rows, columns, stored = drawn
    parts = [torch.randn(stored, columns), torch.randn(stored, columns)]
    expected = torch.zeros(len(rows), columns)
    for place, (source, row) in enumerate(rows):
        if source >= 0:
            expected[place] = parts[source][row]
        elif source == MEAN:
            expected[place] = ((parts[0][0].double() + parts[1][stored - 1].double()) / 2).float()
    padding = torch.tensor([source == PADDING for source, _ in rows])
    expected[padding] = expected[~padding].double().sum(0).div(max(int((~padding).sum()), 1)).float()
    means = np.array([source == MEAN for source, _ in rows])

    def constant(part: int, row: int) -> Segments:
        return Segments.of(np.where(means, part, ZERO), np.where(means, row, 0))

    mapped = MappedRows(
        rows=Segments.of(*np.array(rows, dtype=np.int64).T), summed=(constant(0, 0), constant(1, stored - 1))
    )
    entries = tuple(TensorEntry(str(n), "F32", (stored, columns), "f", 0, stored * columns * 4) for n in range(2))
    entry = DerivedEntry(
        name="x", dtype="F32", shape=(len(rows), columns), file="f", offset=0, nbytes=len(rows) * columns * 4,
        parts=entries, derivation=mapped,
    )  # fmt: skip
    first = data.draw(st.integers(0, entry.elements - 1))
    count = data.draw(st.integers(1, entry.elements - first))
    out = torch.full((count,), torch.nan)
    mapped.fill(entry, out, first, lambda part, at, many: parts[int(part.name)].flatten()[at : at + many])
    torch.testing.assert_close(out, expected.flatten()[first : first + count], rtol=0, atol=1e-6)


@pytest.mark.parametrize("columns", [8, 3 * PIECE_ELEMENTS])
def test_a_run_takes_no_more_than_it_says(columns):
    """However small the run is: finding the row that pads reads the whole matrix, piece by piece."""
    rows = Segments.of(np.array([0, 0, MEAN, PADDING]), np.array([0, 1, 2, 0]))
    summed = tuple(Segments.of(np.array([ZERO, ZERO, 0, ZERO]), np.array([0, 0, row, 0])) for row in (0, 1))
    mapped, size = MappedRows(rows=rows, summed=summed), 2 * columns * 4
    entry = DerivedEntry(
        name="x", dtype="F32", shape=(4, columns), file="f", offset=0, nbytes=2 * size,
        parts=(TensorEntry("x", "F32", (2, columns), "f", 0, size),), derivation=mapped,
    )  # fmt: skip
    longest = 0

    def read(part: TensorEntry, first: int, elements: int) -> Tensor:
        nonlocal longest
        longest = max(longest, elements)
        return torch.ones(elements)

    out = torch.full((5,), torch.nan)
    mapped.fill(entry, out, 3 * columns, read)
    assert (out == 1).all()
    assert longest * 4 + max(PIECE_ELEMENTS, columns) * 20 <= entry.scratch_bytes(5)


# what is refused


def refused(recipe: Mapping[str, object]) -> StreamMergeError:
    with pytest.raises(StreamMergeError) as caught:
        streammerge.plan(recipe)
    return caught.value


def test_models_of_other_sizes_need_a_tokenizer_source(family):
    error = refused(family.recipe())
    assert "`lm_head.weight` is [29, 8] in `base` but [32, 8] in `a`" in error.message
    assert error.hint == vocabulary.VOCABULARIES_HINT


def test_rows_that_are_not_of_one_token_are_told_of(tmp_path):
    for seed, (name, added) in enumerate({"base": ["<x>"], "a": ["<y>"], "b": ["<x>"]}.items()):
        save(tmp_path / name, seed, added)
    (warning,) = streammerge.plan(linear_of(tmp_path, "a", "b")).warnings[-1:]
    assert warning == (
        "row 29 is `<x>` in `base` and `<y>` in `a`: set `tokenizer_source` to merge tokens by their text"
    )
    assert not [w for w in streammerge.plan(linear_of(tmp_path, "b")).warnings if "tokenizer_source" in w]
    assert not streammerge.plan(linear_of(tmp_path, "a", "b") | {"tokenizer_source": "union"}).warnings[1:]
    # what nobody asked for is no reason to stop
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    assert not [w for w in streammerge.plan(linear_of(tmp_path, "a", "b")).warnings if "tokenizer_source" in w]


def test_a_union_of_tokenizers_that_cut_otherwise_is_refused(family, tmp_path):
    ids = save(tmp_path / "w", 4, ["<W>"], words=("the", "cat", "zoo", "on", "a", "mat", "dog"))
    recipe = {**family.recipe(), "models": [{"model": str(tmp_path / "w")}], "tokenizer_source": "union"}
    error = refused(recipe)
    assert error.message == (
        "`w` cuts text by a vocabulary of its own: 3 of its tokens are not in `base`: `z`, `zo`, `zoo`"
    )
    assert "Only added tokens can be united" in str(error.hint)
    plan = streammerge.plan({**recipe, "tokenizer_source": "base"})
    assert any("cuts text into tokens otherwise than `base`" in warning for warning in plan.warnings)
    found = merged({**recipe, "tokenizer_source": str(tmp_path / "w")}, tmp_path / "out")
    assert found[HEAD].shape[0] == len(ids)


def test_a_token_without_a_row_anywhere_is_refused_until_a_rule_says_what_it_is(tmp_path):
    save(tmp_path / "base", 0)
    save(tmp_path / "a", 1)
    file = tmp_path / "a" / "tokenizer.json"
    table = json.loads(file.read_text())
    table["added_tokens"].append({"id": 29, "content": "<pad>"})
    file.write_text(json.dumps(table))
    recipe = linear_of(tmp_path, "a")
    error = refused(recipe | {"tokenizer_source": "union"})
    assert error.message == "no model has a row for 1 token(s) such as `<pad>`"
    tokenizer = {"tokens": {"<pad>": {"source": {"kind": "zero"}}}}
    plan = streammerge.plan(recipe | {"tokenizer": tokenizer})
    assert any("`a` has no rows for 1 token(s)" in warning for warning in plan.warnings)
    assert not merged(recipe | {"tokenizer": tokenizer}, tmp_path / "out")[EMBEDDING][29].any()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "model_token", "model": "b", "token": "<A>"}, "from `b`, which has no row for `<A>`"),
        ({"kind": "model_token", "model": "b", "token_id": 32}, "from `b`, which has no row 32"),
        ("b", "from `b`, which has no row for `<A>`"),
    ],
)
def test_a_rule_that_names_a_row_that_is_not_there_is_refused(family, source, message):
    source = family[source] if isinstance(source, str) else {**source, "model": family[source["model"]]}
    error = refused(family.recipe(tokenizer={"tokens": {"<A>": {"source": source}}}))
    assert error.message == f"the row of `<A>` is to come {message}"


def test_a_tokenizer_in_another_format_is_refused_with_a_way_out(tmp_path):
    family = Family(tmp_path)
    (tmp_path / "a" / "tokenizer.json").rename(tmp_path / "a" / "tokenizer.model")
    error = refused(family.recipe(tokenizer_source="union"))
    assert "has its tokenizer in `tokenizer.model` only" in error.message
    assert "save_pretrained" in str(error.hint)


def _deep(levels: int) -> str:
    return '{"model": {"vocab": {"a": 0}}, "x": ' + "[" * levels + "]" * levels + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"vocab": {"a": -1}}}', "`a` has the id `-1`"),
        ('{"model": {"vocab": {"a": 1000000000000}}}', "`a` has the id `1000000000000`"),
        ('{"model": {"vocab": {"a": 1.0}}}', "`a` has the id `1.0`"),
        ('{"model": {"vocab": {"a": true}}}', "`a` has the id `True`"),
        ('{"model": {"vocab": {"a": 3, "b": 3}}}', "`a` and `b` have one id"),
        ('{"model": {"vocab": {"a": 3, "a": 4}}}', "has the key `a` twice"),
        ('{"model": {"vocab": [["a", 0.5], ["a", 0.5]]}}', "lists a piece twice"),
        ('{"model": {"vocab": [[]]}}', "lists a piece that is not text"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "a", "id": 1}]}', "`a` has two ids"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": 0}]}', "`a` and `b` have one id"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}', "`b` has the id `None`"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "an added token without `content`"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": {}}', None),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": 7}', "`added_tokens` that are not a list"),
        ('{"model": {"vocab": 7}}', "no `vocab` in its `model`"),
        ('{"version": "1.0"}', "no `vocab` in its `model`"),
        ("[]", "no `vocab` in its `model`"),
        ("{", "does not hold readable JSON"),
        (_deep(70), "nests JSON deeper than"),
        (_deep(100_000), "JSON"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_hostile_tokenizer_is_refused(text, message, tmp_path):
    family = Family(tmp_path)
    (tmp_path / "a" / "tokenizer.json").write_text(text)
    if message is None:
        streammerge.plan(family.recipe(tokenizer_source="base"))
        return
    with pytest.raises(CheckpointError) as caught:
        streammerge.plan(family.recipe(tokenizer_source="base"))
    assert message in caught.value.message
    assert "/a/tokenizer.json`" in caught.value.message


def _json_of(tokens: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    numbers = st.one_of(st.integers(-2, 9), st.integers(2**22 - 1, 2**70), st.none(), st.booleans(), st.floats())
    added = st.fixed_dictionaries(
        {}, optional={"content": st.one_of(tokens, numbers), "id": numbers, "special": numbers}
    )
    vocab = st.one_of(
        st.dictionaries(tokens, numbers, max_size=3), st.lists(st.lists(st.one_of(tokens, numbers))), numbers
    )
    merges = st.lists(st.one_of(tokens, numbers, st.lists(st.one_of(tokens, numbers), max_size=3)), max_size=3)
    core = st.fixed_dictionaries({}, optional={"vocab": vocab, "merges": st.one_of(merges, numbers)})
    return st.fixed_dictionaries(
        {},
        optional={"model": st.one_of(core, numbers), "added_tokens": st.one_of(st.lists(added, max_size=3), numbers)},
    )


@settings(max_examples=300, deadline=None)
@given(_json_of(st.text(max_size=2)))
def test_whatever_a_tokenizer_says_it_is_read_or_refused(table):
    files = {"tokenizer.json": FileFacts(1, 0)}
    model = Checkpoint(location="m", tensors={}, config={}, files=files, header_sha256={})
    try:
        found = parse_tokenizer(model, (json.dumps(table).encode(),))
    except CheckpointError:
        return
    assert len(set(found.ids.values())) == len(found.ids)
    assert found.added.keys() <= found.ids.keys()


def test_ten_million_tokens_are_refused_before_they_are_built(tmp_path):
    family = Family(tmp_path)
    (tmp_path / "a" / "tokenizer.json").write_text('{"model": {"vocab": {' + '"a":0,' * 10**7 + '"b":1}}}')
    error = refused(family.recipe(tokenizer_source="base"))
    assert "more than 4000000 JSON values" in error.message


# recipes


TASK = "merge_method: task_arithmetic\nbase_model: org/base\nmodels: [{model: org/a}, {model: org/b}]\n"


def test_the_tokenizer_of_a_recipe_survives_being_written() -> None:
    text = TASK + (
        "tokenizer:\n  source: org/a\n  pad_to_multiple_of: 64\n  tokens:\n"
        "    <a>: {source: org/b, force: true}\n    <b>: {source: zero}\n    <c>: {source: {kind: zero}, force: 1.0}\n"
        "    <d>: {source: {kind: model_token, model: base, token: the}}\n"
        "    <e>: {source: {kind: model_token, model: org/a, token_id: 0}}\n"
    )
    recipe = Recipe.from_yaml(text)
    assert recipe.tokenizer_source == "org/a"
    assert recipe.pad_to_multiple_of == 64
    assert [(rule.token, rule.model, rule.source, rule.force) for rule in recipe.tokens] == [
        ("<a>", "org/b", None, True),
        ("<b>", None, None, False),
        ("<c>", None, None, True),
        ("<d>", "org/base", "the", False),
        ("<e>", "org/a", 0, False),
    ]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(TASK + "tokenizer: {pad_to_multiple_of: 8}\n").tokenizer_source == "union"


def test_the_readmes_example_is_a_recipe() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(tokenizer:.*?)```", readme, re.DOTALL)
    models = "models: [{model: models/llama-code}]\n"
    recipe = Recipe.from_yaml(f"merge_method: linear\nbase_model: models/llama\n{models}{example}")
    assert (len(recipe.tokens), recipe.tokens[0].force, recipe.pad_to_multiple_of) == (3, True, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenizer: {tokens: {<a>: {force: true}}}", "4: `source` is missing"),
        ("tokenizer: {tokens: {<a>: {source: org/c}}}", "4: `source` is the text `org/c`, expected a model"),
        ("tokenizer: {tokens: {<a>: {source: 7}}}", "4: `source` is `7`, expected a model of this recipe, `zero`"),
        ("tokenizer: {tokens: {<a>: {source: {kind: one}}}}", "4: `kind` is the text `one`, expected `zero` or"),
        ("tokenizer: {tokens: {<a>: {source: {kind: zero, model: org/a}}}}", "4: `kind: zero` has no model"),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: model_token, model: org/a}}}}",
            "4: `model_token` has `token` or `token_id`, found neither",
        ),
        (
            "tokenizer: {tokens: {<a>: {source: {kind: model_token, model: org/a, token_id: -1}}}}",
            "4: `token_id` is `-1`, expected a row",
        ),
        ("tokenizer: {pad_to_multiple_of: 0}", "4: `pad_to_multiple_of` is `0`, expected a whole number from 1"),
        ("tokenizer: {sauce: union}", "4: unknown key `sauce`"),
    ],
)
def test_a_wrong_tokenizer_section_is_refused_where_it_stands(text, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(TASK + text + "\n")
    assert message in caught.value.message
