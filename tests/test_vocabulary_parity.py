"""mergekit's `tokenizer` sections give the rows that mergekit gives, token by token: run it and compare."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import streammerge
from tests.stored import tensors_of
from tests.test_mergekit_parity import PYTHON
from tests.vocabularies import Family, ids_of

pytestmark = pytest.mark.parity

# @a stands for the folder of the model `a`
RULES = """
tokens:
  <A>: {source: {kind: zero}}
  <S>: {source: '@b', force: true}
  <T>: {source: '@c'}
  <B>: {source: {kind: model_token, model: '@a', token: the}}
  <C>: {source: {kind: model_token, model: '@a', token_id: 3}, force: true}
"""
SECTIONS = {
    "union": "source: union",
    "base": "source: base",
    "an expert's": "source: '@a'",
    "one that pads": "source: '@c'",
    "padded": "{source: union, pad_to_multiple_of: 16}",
    "without a source": "pad_to_multiple_of: 16",
    "rules": "source: union" + RULES,
    "zeros by force": "{tokens: {the: {source: {kind: zero}, force: true}, <S>: {source: {kind: zero}}}}",
    "a row that pads": "tokens: {<S>: {source: {kind: model_token, model: '@c', token_id: 35}, force: true}}",
    "a new token": "tokens: {<new>: {source: {kind: model_token, model: '@a', token: the}}}",
    "a new token of zeros": "tokens: {<new>: {source: {kind: zero}}}",
}
REFUSED = {
    "a row that is not there": "tokens: {<A>: {source: '@b'}}",
    "no source": "tokens: {<S>: {force: true}}",
}
BASED = (True, False)


@dataclass(frozen=True)
class Ran:
    """What mergekit made of every section, with a base (task arithmetic) and without one (linear)."""

    folder: Path
    family: Family
    failed: frozenset[str]

    def recipe(self, section: str, based: bool) -> dict[str, object]:
        text = ({**SECTIONS, **REFUSED})[section]
        for name in ("a", "b", "c"):
            text = text.replace(f"@{name}", self.family[name])
        method = "task_arithmetic" if based else "linear"
        recipe = self.family.recipe(method, tokenizer=yaml.safe_load(text), dtype="float32")
        return {key: value for key, value in recipe.items() if based or key != "base_model"}

    def out(self, section: str, based: bool) -> Path:
        return self.folder / f"{section} {based}"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    if not PYTHON.exists():
        pytest.skip(f"no mergekit: {PYTHON} is missing; `make test-parity` installs it")
    folder = tmp_path_factory.mktemp("vocabularies")
    found = Ran(folder, Family(folder / "models"), frozenset())
    jobs = []
    for section in (*SECTIONS, *REFUSED):
        for based in BASED:
            recipe = folder / f"{section} {based}.yaml"
            recipe.write_text(yaml.safe_dump(found.recipe(section, based)))
            jobs.append((str(recipe), str(found.out(section, based)), 0))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PYTHON), str(Path(__file__).with_name("parity_mergekit.py")), str(folder / "jobs.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return Ran(folder, found.family, frozenset(json.loads(done.stdout)["failed"]))


# without a base `source: base` is some model's to mergekit; ours asks which
@pytest.mark.parametrize(("section", "based"), [(s, b) for s in SECTIONS for b in BASED if b or s != "base"])
def test_every_token_has_the_row_that_mergekit_gives_it(ran, section, based, tmp_path):
    theirs_folder = ran.out(section, based)
    assert str(theirs_folder) not in ran.failed
    streammerge.merge(ran.recipe(section, based), tmp_path / "out")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(theirs_folder)
    our_ids, their_ids = ids_of(tmp_path / "out"), ids_of(theirs_folder)
    assert our_ids.keys() == their_ids.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        order = torch.arange(tensor.shape[0])
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            # mergekit numbers added tokens in an order of its own; rows that pad keep their places
            for token, number in our_ids.items():
                order[number] = their_ids[token]
        torch.testing.assert_close(ours[name], tensor[order], rtol=1e-5, atol=1e-6)
    sizes = [
        json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (tmp_path / "out", theirs_folder)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("section", REFUSED)
def test_what_mergekit_fails_at_is_refused(ran, section):
    assert str(ran.out(section, True)) in ran.failed
    with pytest.raises(streammerge.StreamMergeError):
        streammerge.plan(ran.recipe(section, True))
