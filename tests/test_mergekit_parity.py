"""mergekit's recipes give what mergekit gives: run it, as it comes from the registry, and compare every tensor.

`make test-parity` installs it in an environment of its own; STREAMMERGE_MERGEKIT names the Python of another one.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import streammerge
from streammerge import methods
from tests.parity_models import save_family
from tests.parity_recipes import CASES, GROWING, RANDOM, REFUSED, Case
from tests.stored import tensors_of

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("STREAMMERGE_MERGEKIT", ROOT / ".cache" / "mergekit-venv" / "bin" / "python"))
SEEDS = range(1, 25)
# of the tensor, and of its change as far as float32 holds it
TOLERANCE, HELD = 1e-5, 2.0**-20


@dataclass(frozen=True)
class Mergekit:
    """What mergekit made of every recipe."""

    folder: Path
    family: Mapping[str, Path]
    methods: frozenset[str]
    failed: Mapping[str, str]

    def recipe(self, case: Case) -> Path:
        return self.folder / f"{case.name}.yaml"

    def merged(self, case: Case, seed: int = 0) -> dict[str, Tensor]:
        out = self.folder / f"{case.name} {seed}"
        assert str(out) not in self.failed, self.failed[str(out)]
        return tensors_of(out)

    def models(self, *names: str) -> list[dict[str, Tensor]]:
        return [tensors_of(self.family[name]) for name in names]


@pytest.fixture(scope="module")
def mergekit(tmp_path_factory: pytest.TempPathFactory) -> Mergekit:
    if not PYTHON.exists():
        pytest.skip(f"no mergekit: {PYTHON} is missing; `make test-parity` installs it")
    folder = tmp_path_factory.mktemp("mergekit")
    family = save_family(folder / "models")
    runs = [(case, 0) for case in (*CASES, *REFUSED, GROWING)] + [(case, seed) for case in RANDOM for seed in SEEDS]
    for case, _ in runs:
        (folder / f"{case.name}.yaml").write_text(case.text(family))
    jobs = [(str(folder / f"{c.name}.yaml"), str(folder / f"{c.name} {seed}"), seed) for c, seed in runs]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PYTHON), str(Path(__file__).with_name("parity_mergekit.py")), str(folder / "jobs.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    return Mergekit(folder, family, frozenset(answer["methods"]), answer["failed"])


def ours(recipe: object, folder: Path) -> dict[str, Tensor]:
    streammerge.merge(recipe, folder)  # type: ignore[arg-type]
    return tensors_of(folder)


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[str]:
    """The tensors that differ by more than the tolerance, worst first."""
    assert found.keys() == expected.keys()
    worst = {}
    for name, tensor in expected.items():
        # a stack has layers that the base does not have
        size, change = tensor.double().norm(), (tensor.double() - base.get(name, tensor * 0).double()).norm()
        distance = (found[name].double() - tensor.double()).norm()
        if not distance <= min(TOLERANCE * size, TOLERANCE * change + HELD * size):
            worst[name] = (distance / size).item()
    return [f"{name} {worst[name]:.1e}" for name in sorted(worst, key=worst.__getitem__, reverse=True)]


def named(cases: Sequence[Case]) -> list[object]:
    """Cases by name; what is open is expected to fail, and fails when it no longer does."""

    def mark(reason: str) -> pytest.MarkDecorator:
        return pytest.mark.xfail(strict=True, raises=(AssertionError, streammerge.StreamMergeError), reason=reason)

    return [pytest.param(case, id=case.name, marks=[mark(case.open)] if case.open else []) for case in cases]


@pytest.mark.parametrize("case", named([case for case in CASES if not (case.defect or case.differs)]))
def test_the_same_recipe_gives_the_same_weights(mergekit, case, tmp_path):
    (base,) = mergekit.models("base")
    theirs = mergekit.merged(case)
    assert differences(ours(mergekit.recipe(case), tmp_path / "out"), theirs, base) == []
    if "compat" in methods.describe(case.method).parameters:
        assert differences(ours(compatible(mergekit.recipe(case)), tmp_path / "as mergekit"), theirs, base) == []


@pytest.mark.parametrize("case", named([case for case in CASES if case.defect]))
def test_a_defect_is_reproduced_on_demand_only(mergekit, case, tmp_path):
    (base,) = mergekit.models("base")
    theirs, expected = mergekit.merged(case), right(mergekit, case)
    assert differences(theirs, expected, base), f"mergekit gets it right: {case.defect}"
    assert differences(ours(mergekit.recipe(case), tmp_path / "right"), expected, base) == []
    assert differences(ours(compatible(mergekit.recipe(case)), tmp_path / "as mergekit"), theirs, base) == []


@pytest.mark.parametrize("case", named([case for case in CASES if case.differs]))
def test_a_base_that_mergekit_would_add_is_warned_of_and_may_be_listed(mergekit, case, tmp_path):
    (base,) = mergekit.models("base")
    theirs = mergekit.merged(case)
    recipe = yaml.safe_load(mergekit.recipe(case).read_text())
    assert [case.differs in warning for warning in streammerge.Recipe.load(recipe).warnings] == [True]
    assert differences(ours(recipe, tmp_path / "out"), theirs, base)
    listed = recipe | {"models": [*recipe["models"], {"model": recipe["base_model"]}]}
    assert differences(ours(listed, tmp_path / "listed"), theirs, base) == []


def test_what_lies_above_the_layers_is_merged_of_all_sources_of_the_last_slice(mergekit, tmp_path):
    base, b, c = mergekit.models("base", "b", "c")
    theirs, found = mergekit.merged(GROWING), ours(mergekit.recipe(GROWING), tmp_path / "out")
    above = {"model.norm.weight", "lm_head.weight"}
    assert {name.partition(" ")[0] for name in differences(found, theirs, base)} == above
    for name in above:
        torch.testing.assert_close(theirs[name], b[name])
        torch.testing.assert_close(found[name], (b[name] + c[name]) / 2)


def compatible(recipe: Path) -> dict[str, object]:
    """The recipe with `compat: mergekit`."""
    read: dict[str, object] = yaml.safe_load(recipe.read_text())
    return read | {"parameters": (read.get("parameters") or {}) | {"compat": "mergekit"}}  # type: ignore[operator]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_mergekit_overlooks_is_refused_with_a_hint(mergekit, case, tmp_path):
    mergekit.merged(case)
    with pytest.raises(streammerge.StreamMergeError) as caught:
        ours(mergekit.recipe(case), tmp_path / "out")
    assert caught.value.hint


def test_there_is_a_recipe_for_every_method_of_mergekit(mergekit):
    assert mergekit.methods == {case.method for case in CASES}


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)
def test_random_methods_agree_on_average(mergekit, case, tmp_path):
    """Each entry's mean over seeds lies as far from mergekit's as two means of that many draws do."""
    (base,) = mergekit.models("base")
    recipe = yaml.safe_load(mergekit.recipe(case).read_text())
    mine = stacked([ours(recipe | {"seed": seed}, tmp_path / str(seed)) for seed in SEEDS], base)
    theirs = stacked([mergekit.merged(case, seed) for seed in SEEDS], base)
    expected = (mine.var(0) + theirs.var(0)).sum() / len(SEEDS)
    found = (mine.mean(0) - theirs.mean(0)).square().sum()
    assert found / expected == pytest.approx(1.0, abs=0.1)
    # and single draws are as wide
    assert mine.var(0).sum() == pytest.approx(theirs.var(0).sum().item(), rel=0.05)


@pytest.mark.parametrize("case", [c for c in RANDOM if c.recipe.count("- model:") == 1], ids=lambda case: case.name)
def test_what_is_kept_of_one_expert_is_as_long_as_all_of_it(mergekit, case, tmp_path):
    """Both rescale each tensor to its sum of magnitudes; what is kept is a random half."""
    base, expert = mergekit.models("base", "a")
    recipe = yaml.safe_load(mergekit.recipe(case).read_text())
    for merged in (ours(recipe | {"seed": 1}, tmp_path / "out"), mergekit.merged(case, 1)):
        kept = entries = 0
        for name, tensor in merged.items():
            change, whole = tensor.double() - base[name].double(), expert[name].double() - base[name].double()
            assert change.abs().sum() == pytest.approx(whole.abs().sum().item(), rel=1e-4), name
            kept, entries = kept + int((change != 0).sum()), entries + change.numel()
        assert abs(kept - entries / 2) < 5 * (entries / 4) ** 0.5


def stacked(merged: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor]) -> Tensor:
    """The merged changes, [merges, entries] float64; each tensor's entries are about as large as another's."""
    return torch.stack(
        [torch.cat([(m[name].double() - t.double()).flatten() for name, t in base.items()]) for m in merged]
    )


def right(mergekit: Mergekit, case: Case) -> dict[str, Tensor]:
    """What METHODS says a recipe with a defect gives, in float64."""
    recipe = yaml.safe_load(mergekit.recipe(case).read_text())
    base = tensors_of(Path(recipe["base_model"]))
    listed = [Path(entry["model"]) for entry in recipe["models"]]
    experts = [tensors_of(folder) for folder in listed if str(folder) != recipe["base_model"]]
    merged = {}
    for name, tensor in base.items():
        changes = torch.stack([expert[name].double() - tensor.double() for expert in experts])
        merged[name] = tensor.double() + RIGHT[case.method](changes, tensor.double(), recipe.get("parameters", {}))
    return merged


def sce(changes: Tensor, base: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """Weights by the mean square of the change however small it is; what agrees with the sum's sign."""
    weights = changes.flatten(1).square().mean(1)
    weights = (weights / weights.sum()).view(-1, *[1] * base.ndim)
    agree = changes.sign() == torch.where(changes.sum(0) >= 0, 1.0, -1.0)
    return (weights * agree * changes).sum(0) / (weights * agree).sum(0).clamp(min=1e-300)


def model_stock(changes: Tensor, base: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """Cosines however short the changes are; a share in [0, 1]."""
    count, flat = len(changes), changes.flatten(1)
    cosines = torch.nn.functional.normalize(flat, eps=0.0) @ torch.nn.functional.normalize(flat, eps=0.0).T
    cosine = ((cosines.sum() - count) / (count * (count - 1))).clamp(min=0.0)
    return count * cosine / (1 + (count - 1) * cosine) * changes.mean(0)


def slerp(changes: Tensor, base: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """The arc; straight where a tensor is all zero, and from |cosine| 0.9995 on."""
    return on_arc(parameters["t"], base, base + changes[0], 0.9995) - base


def nuslerp(changes: Tensor, base: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """The arc between two changes of equal weight; straight where one is all zero."""
    return on_arc(0.5, changes[0], changes[1], 1.0)


def on_arc(t: float, a: Tensor, b: Tensor, nearly_parallel: float) -> Tensor:
    lengths = a.norm() * b.norm()
    if lengths == 0 or ((a * b).sum() / lengths).abs() > nearly_parallel:
        return (1 - t) * a + t * b
    angle = ((a * b).sum() / lengths).acos()
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def arcee_fusion(changes: Tensor, base: Tensor, parameters: Mapping[str, float]) -> Tensor:
    """|D| times the divergence of its row, from median + 1.5 interquartile ranges on."""
    (change,) = changes
    new, old = ((base + each).softmax(-1) + 1e-8 for each in (change, torch.zeros_like(change)))
    importance = change.abs() * (new * (new.log() - old.log())).sum(-1, keepdim=True).clamp(min=0.0)
    ranked = importance.flatten().sort().values
    lower, median, upper = (ranked[place * (len(ranked) - 1) // 4] for place in (1, 2, 3))
    return torch.where(importance >= median + 1.5 * (upper - lower), change, 0.0)


RIGHT: Mapping[str, Callable[[Tensor, Tensor, Mapping[str, float]], Tensor]] = {
    "sce": sce,
    "model_stock": model_stock,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "arcee_fusion": arcee_fusion,
}
