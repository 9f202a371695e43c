"""The model card: its head is the hub's, its licences are the models', its results are replaced and nothing else."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given
from hypothesis import strategies as st

import streammerge
from streammerge import api, methods
from streammerge.card import model_card, plain, with_results
from streammerge.checkpoint import FileFacts
from streammerge.licences import licence_of
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from streammerge.storage.local import LocalStorage
from streammerge.storage.places import Places
from tests.hub_server import places_of
from tests.models import recipe_of
from tests.test_hub_merge import remote

APACHE = "---\nlicense: apache-2.0\n---\n"
LLAMA = "---\nlanguage: [en]\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags:\n- x\n---\n# Llama\n"


def put(family: Mapping[str, Path], **cards: str | bytes) -> None:
    for name, card in cards.items():
        (family[name] / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())


def plan_of(family: Mapping[str, Path], method: str = "linear", **more: object) -> Plan:
    return make_plan(Recipe.from_dict(recipe_of(family, method, **more)), LocalStorage(), memory_bytes=1 << 30)


def card_of(planned: Plan) -> ModelCard:
    return ModelCard(model_card(planned))


def section(card: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


# licences


def test_a_licence_that_all_models_have_is_the_merges(family):
    put(family, base=APACHE, math=APACHE.replace("apache", "Apache"), code=APACHE, chat=APACHE)
    planned = plan_of(family)
    card = card_of(planned)
    assert card.data.license == "apache-2.0"
    assert "All models are under apache-2.0" in section(card.text, "Models and licences")
    assert not any("licence" in warning for warning in planned.warnings)


def test_a_licence_with_a_name_is_taken_with_it(family):
    # each names a file of its own folder
    put(family, **dict.fromkeys(family, LLAMA))
    put(family, math=LLAMA.replace("LICENSE", "https://example.org/terms"))
    data = card_of(plan_of(family)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "LICENSE")


def test_a_conflict_is_told_before_the_merge_and_in_the_card(family):
    put(family, base=APACHE, math=LLAMA, code=APACHE)
    planned = plan_of(family)
    (warning,) = (each for each in planned.warnings if "licence" in each)
    assert warning.startswith("the models' licences differ, check what they allow together: ")
    assert f"`{family['math']}` `other (llama3, LICENSE)`; `{family['code']}` `apache-2.0`" in warning
    card = card_of(planned)
    assert card.data.license is None
    told = section(card.text, "Models and licences")
    assert "**The licences conflict.**" in told
    assert f"- {plain(family['base'])}, the base: apache-2.0\n" in told
    assert f"- {plain(family['math'])}: other (llama3, LICENSE)\n" in told
    assert f"- {plain(family['chat'])}: unknown: no card lies beside the weights\n" in told
    # said once
    assert "licences differ" not in card.text


def test_an_unknown_licence_is_neither_inherited_nor_a_conflict(family):
    put(family, base=APACHE, math=APACHE, code="# no head\n")
    planned = plan_of(family)
    assert not any("licence" in warning for warning in planned.warnings)
    card = card_of(planned)
    assert card.data.license is None
    assert "Not every model's licence is known" in card.text
    assert "unknown: the card names none" in card.text


@pytest.mark.parametrize(
    ("card", "terms"),
    [
        ("---\nlicense: mit\n---", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\ntext", {"license": "mit"}),
        ("---\nlicense:\n- mit\n- bsd\n---\n", {"license": "bsd, mit"}),
        ("---\nlicense:\n  - bsd\n  - mit\ntags: [license]\n---\n", {"license": "bsd, mit"}),
        ("---\ntags:\n  license: mit\n---\n", {}),
        ("---\nmodel: !!python/object/apply:os.system [x]\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: !!python/object/apply:os.system [x]\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense: &a [*a]\n---\n", None),
        ("---\nlicense: 3\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("license: mit\n", {}),
        ("---\nlicense_name: x\n---\n", {"license_name": "x"}),
        ("---\nx: " + "y" * (2 << 20) + "\nlicense: mit\n---\n", {}),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", None),
        (b"---\nlicense: \xff\xfe\n---\n", {"license": "\ufffd\ufffd"}),
    ],
)  # fmt: skip
def test_a_cards_head_is_read_as_data_or_not_at_all(family, card, terms):
    put(family, base=card)
    found = licence_of(LocalStorage(), plan_of(family).models[0])
    if terms is None:
        assert found.missing == "the card cannot be read"
    else:
        assert found.terms == terms
        assert bool(found.missing) == ("license" not in terms)


def test_a_head_of_many_results_takes_no_time(family):
    results = "\n".join(f"  - {{task: t{i}, value: {i}}}" for i in range(30_000))
    put(family, base=f"---\nmodel-index:\n{results}\nlicense: mit\n---\n")
    assert licence_of(LocalStorage(), plan_of(family).models[0]).told == "mit"


def test_a_card_said_to_be_huge_is_not_asked_for(family):
    model = plan_of(family).models[0]
    huge = {**model.files, "README.md": FileFacts(1 << 40, 0)}
    object.__setattr__(model, "files", huge)
    assert "1099511627776 bytes" in licence_of(LocalStorage(), model).told


@given(st.text())
def test_no_licence_and_no_name_breaks_the_head(text):
    # as a head would have it after it was read
    from streammerge.licences import Licence

    found = Licence(location="m", terms={"license": text})
    if found.is_identifier:
        assert yaml.safe_load(f"license: {json.dumps(text)}") == {"license": text}
        assert re.fullmatch("[a-z0-9.+-]+", text)


# what was merged, and by what


def test_models_on_the_hub_are_named_for_it(family, hub, tmp_path):
    put(family, **dict.fromkeys(family, APACHE))
    for name, folder in family.items():
        hub.push(f"org/{name}", folder)
    card = card_of(streammerge.plan(remote("linear"), storage=places_of(hub, tmp_path)))
    assert card.data.base_model == [f"org/{name}" for name in ("base", "math", "code", "chat")]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert card.data.license == "apache-2.0"
    assert re.search("- org/math@[0-9a-f]{40}: apache-2.0\n", card.text)


def test_a_model_on_the_hub_without_a_card_has_no_known_licence(hub, tmp_path):
    card = card_of(streammerge.plan(remote("linear"), storage=places_of(hub, tmp_path)))
    assert card.text.count("unknown: no card lies beside the weights") == 4


def test_a_folder_that_looks_like_a_name_on_the_hub_is_none(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"merge_method": "linear", "models": [{"model": f"./{name}"} for name in ("math", "code")]}
    (tmp_path / "org").mkdir()
    for name in ("math", "code"):
        (tmp_path / "org" / name).symlink_to(family[name])
    for start in ("./", "org/"):
        recipe["models"] = [{"model": f"{start}{name}"} for name in ("math", "code")]
        assert card_of(streammerge.plan(recipe, storage=Places())).data.base_model is None


def test_a_folder_of_the_hubs_cache_is_named_for_it(family, tmp_path):
    moved = {}
    for name, folder in family.items():
        moved[name] = tmp_path / "cache" / f"models--org--{name}" / "snapshots" / ("a" * 40)
        moved[name].parent.mkdir(parents=True)
        folder.rename(moved[name])
    assert card_of(plan_of(moved)).data.base_model == [f"org/{name}" for name in moved]


def test_every_method_that_was_used_is_cited_and_no_other(family):
    rules = [{"match": "q_proj", "merge_method": "knots", "parameters": {"rule": "dare_ties"}},
             {"match": "k_proj", "merge_method": "tsv"}, {"match": "lm_head", "keep": "base"}]  # fmt: skip
    told = section(card_of(plan_of(family, "actmat", rules=rules)).text, "Methods")
    expected = {"actmat": "", "linear": "", "tsv": "", "knots": "", "dare_ties": ", inside `knots`"}
    for name, inside in expected.items():
        number = str(methods.describe(name).paper).removeprefix("arXiv:")
        (line,) = (each for each in told.splitlines() if each.startswith(f"- `{name}`{inside}, of "))
        assert line.endswith(f"[arXiv:{number}](https://arxiv.org/abs/{number})")
    assert len(re.findall("^- `", told, re.MULTILINE)) == len(expected)
    assert "- `knots`, of 2 tensors: " in told
    assert "- 2 tensors are copied as stored." in told


def test_the_limits_tell_the_plans_warnings_and_copied_code(family):
    (family["math"] / "chat_template.jinja").write_text("x")
    (family["base"] / "modeling_own.py").write_text("x")
    planned = plan_of(family)
    told = section(card_of(planned).text, "Limits")
    assert all(plain(warning) in told for warning in planned.warnings)
    assert planned.warnings
    assert r"copied unread: modeling\_own.py." in told


def test_huggingface_hub_reads_every_card_and_writes_it_again(family):
    put(family, **dict.fromkeys(family, LLAMA))
    for method in ("actmat", "ties"):
        card = card_of(plan_of(family, method, name='a "name": #1 — é'))
        assert isinstance(card.data, ModelCardData)
        again = ModelCard(str(card))
        assert again.data.to_dict() == card.data.to_dict()
        assert card.data.to_dict() == {
            "library_name": "transformers", "license": "other", "license_name": "llama3", "license_link": "LICENSE",
            "tags": ["merge", "streammerge"],
        }  # fmt: skip


@given(st.text(), st.text())
def test_text_in_a_card_is_one_line_that_does_nothing(text, more):
    shown = plain(text + more)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|<>]", shown)


# results


RESULTS = {"arc_easy": {"acc": 0.51234, "acc_norm": 1.0}, "a|b<c": {"[x](y)": -3e-7}}


def test_results_are_a_table_that_the_next_ones_replace():
    card = "---\nlicense: mit\n---\n# Mine\n\nwords\n"
    once = with_results(card, RESULTS)
    assert once.startswith(card)
    assert r"| arc\_easy | acc | 0.5123 |" in once
    assert r"| a\|b&lt;c | \[x\](y) | -3e-07 |" in once
    assert with_results(once, RESULTS) == once
    edited = once.replace("## Results\n", "## Results\n\nMy words above.\n") + "\nMy words below.\n"
    twice = with_results(edited, {"t": {"acc": 0.25}})
    assert "| t | acc | 0.25 |" in twice
    assert "arc" not in twice
    assert twice.count("| task |") == 1
    assert "My words above." in twice
    assert twice.endswith("\nMy words below.\n")


@pytest.mark.parametrize("left", [0, 1])
def test_a_mark_that_somebody_deleted_costs_none_of_their_words(left):
    marks = ("<!-- streammerge: results -->", "<!-- streammerge: end of results -->")
    card = f"# Mine\n{marks[left]}\nmy words\n"
    once = with_results(card, RESULTS)
    assert once.startswith(card.rstrip())
    assert with_results(once, RESULTS) == once


def test_ends_of_lines_stay_what_they_are():
    once = with_results("# Mine\r\nwords\r\n", RESULTS)
    assert "\n" not in once.replace("\r\n", "")
    assert with_results(once, RESULTS) == once


@given(st.text(), st.dictionaries(st.text(), st.dictionaries(st.text(), st.floats(-10, 10))))
def test_whatever_a_card_holds_results_come_once_and_take_nothing(card, results):
    once = with_results(card, results)
    assert once.startswith(card.rstrip())
    assert with_results(once, results) == once
    assert with_results(with_results(once, RESULTS), results) == once


def test_a_table_without_end_is_cut():
    many = {f"task{i}": {"acc": 0.5} for i in range(2000)}
    assert with_results("", many).count("| acc |") == 500
    assert "The first 500 of 2000." in with_results("", many)


def score(value: float) -> dict[str, object]:
    program = f"print('{{\"acc\": {value}}}')"
    return {"command": f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {{model}}"}


def test_an_evaluation_puts_its_numbers_into_the_card(family, tmp_path):
    out = tmp_path / "out"
    streammerge.merge(recipe_of(family, "linear"), out)
    card = out / "README.md"
    with card.open("a") as file:
        file.write("\nMy own words.\n")
    before = card.read_text()
    for value in (0.5, 0.75):
        api.evaluate(out, score(value))
        told = card.read_text()
        assert told.startswith(before.rstrip())
        assert f"| command | acc | {value} |" in told
    assert told.count("| acc |") == 1
    assert ModelCard.load(card).data.tags == ["merge", "streammerge"]
    assert not streammerge.verify(out).problems


@pytest.mark.parametrize("kind", ["none", "link", "no text", "folder"])
def test_a_card_that_cannot_be_written_on_keeps_no_result_from_being_kept(tmp_path, kind, caplog):
    card, elsewhere = tmp_path / "model" / "README.md", tmp_path / "elsewhere"
    card.parent.mkdir()
    elsewhere.write_text("mine")
    if kind == "link":
        card.symlink_to(elsewhere)
    elif kind == "no text":
        card.write_bytes(b"\xff\xfe")
    elif kind == "folder":
        card.mkdir()
    api.evaluate(card.parent, score(0.5))
    assert (card.parent / "results.json").is_file()
    assert elsewhere.read_text() == "mine"
    assert ("was left without the results" in caplog.text) == (kind == "no text")
    if kind == "no text":
        assert card.read_bytes() == b"\xff\xfe"
