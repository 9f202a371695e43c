"""What is merged: the methods of the table, and the variations that the defaults are chosen by."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streammerge
from streammerge import methods

MEMORY = "2GiB"
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
IDEAS: Mapping[str, Mapping[str, Any]] = {
    "power ½": {"power": 0.5},
    "power ½, ridge 0.01": {"power": 0.5, "ridge": 0.01},
    "power ½, anchor sum": {"power": 0.5, "anchor": "sum"},
    **{f"ridge by rank, {ridge:g}": {"ridge_by": "rank", "ridge": ridge} for ridge in (0.01, 0.03, 0.1)},
    **{f"ridge by freedom, {share:g}": {"ridge_by": "freedom", "ridge": share} for share in (0.2, 0.4, 0.6, 0.8)},
    **{f"anchor energy, {ridge:g}": {"anchor": "energy", "ridge": ridge} for ridge in (0.1, 1.0)},
    **{f"anchor multiple, {ridge:g}": {"anchor": "multiple", "ridge": ridge} for ridge in (0.1, 0.3, 1.0)},
    "weights by rank": {"weigh": "rank", "exponent": 1.0},
    "weights by rank, anchor sum": {"weigh": "rank", "exponent": 1.0, "anchor": "sum"},
    "weights by norm, anchor multiple": {"weigh": "norm", "exponent": 0.5, "anchor": "multiple"},
}
# the scales of task arithmetic that the validation texts choose from
SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 1.0)
# the papers' settings; what is not named here takes the product's defaults
TIES = {"density": 0.2, "trim": "model", "keep": "threshold", "cancelled": "majority"}
DARE = {"density": 0.5, "rescale_by": "probability"}
# of the language model's 210 matrices, on one core
FOR_HOURS = ("WUDI, 300 steps", "KnOTS-TIES", "KnOTS-TSV")
ALSO_OF_LANGUAGE = (
    *(f"ridge: mean {ridge:g}" for ridge in (0.01, 0.03, 0.3)), "embeddings: base", "output: float32",
    "output: bfloat16, stochastic",
)  # fmt: skip
BY_HARNESS = ("average", "TIES", "ACTMat, paper", "ACTMat")
BY_TRAINING = (
    "average", "task arithmetic, tuned", "TIES", "TSV", "Iso-C", "WUDI, closed", "ACTMat, paper", "adapters: trust 0.1",
    "ACTMat", "RegMean",
)  # fmt: skip
EMBEDDINGS = "word_embeddings|embed_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """One way to merge a suite's experts.

    name     what the row is found by
    group    the table that it belongs to
    recipe   further keys of the recipe
    experts  how many of them, the first; None for all
    tuned    the scale is chosen on validation texts
    estimate for regmean: whose of `estimates` stands for the covariance that it would measure
    """

    name: str
    group: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    experts: int | None = None
    tuned: bool = False
    estimate: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """What a row says of it: the recipe without its models."""
        estimate = {"estimate": self.estimate} if self.estimate else {}
        return {"merge_method": self.method, "parameters": dict(self.parameters), **self.recipe, **estimate}

    @property
    def costly(self) -> bool:
        """Whether it takes a minute where the others take seconds: several spectra of each matrix, or descent."""
        return self.method in ("tsv", "knots", "ace") or "iterations" in self.parameters

    def written(self, base: Path, experts: Sequence[Path], covariances: Sequence[Path] | None = None) -> dict[str, Any]:
        """The recipe, in the base's dtype.

        covariances  each expert's folder as `streammerge capture` made it, for methods that need one
        """
        models: list[dict[str, Any]] = [{"model": str(expert)} for expert in experts]
        for model, folder in zip(models, covariances or (), strict=False):
            model["covariance"] = str(folder)
        return {
            "merge_method": self.method,
            "base_model": str(base),
            "models": models,
            **({"parameters": dict(self.parameters)} if self.parameters else {}),
            **self.recipe,
        }


def carried_out(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Merge into a folder that is not there yet; what it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    report = streammerge.merge(recipe, folder, memory=MEMORY)
    return {
        "merge_cpu_seconds": round(time.process_time() - cpu, 2),
        "merge_seconds": round(time.perf_counter() - wall, 2),
        "merge_memory_bytes": max((nbytes for _, nbytes in report.memory_samples), default=None),
    }


def of_table() -> Iterator[Merge]:
    """The rows of the table of methods: the papers' settings, and the product's defaults where they differ."""

    def row(name: str, method: str, tuned: bool = False, **parameters: Any) -> Merge:
        return Merge(name=name, group="table", method=method, parameters=parameters, tuned=tuned)

    yield row("average", "linear")
    yield row("task arithmetic, sum", "task_arithmetic")
    yield row("task arithmetic, tuned", "task_arithmetic", tuned=True)
    yield row("TIES", "ties", **TIES)
    yield row("DARE", "dare_linear", **DARE, **{"lambda": 0.3})
    yield row("DARE-TIES", "dare_ties", **DARE, normalize=True)
    yield row("Iso-C", "iso_c")
    yield row("TSV", "tsv")
    yield row("KnOTS-TIES", "knots", rule="ties", rule_parameters={"density": 0.2})
    yield row("KnOTS-TSV", "knots", rule="tsv")
    yield row("WUDI, 300 steps", "wudi", iterations=300)
    yield row("WUDI, closed", "wudi")
    yield row("ASWUDI", "aswudi")
    yield row("ACE", "ace")
    yield row("TACT, paper", "tact", solver="pinv")
    yield row("TACT", "tact")
    yield row("RegMean", "regmean")
    yield row("RegMean, reduce 1", "regmean", reduce=1.0)
    yield row("ACTMat, paper", "actmat", solver="pinv")
    yield row("ACTMat, exact", "actmat", solver="exact")
    yield row("ACTMat", "actmat")
    yield row("ACTMat, pooled", "actmat", pool="inputs")
    yield row("ACTMat, top_k", "actmat", solver="top_k")
    yield row("ACTMat, flow", "actmat", solver="flow")
    yield row("ACTMat, sum", "actmat", anchor="sum")
    yield row("ACTMat, sum, p=½", "actmat", anchor="sum", weight_exponent=0.5)


def of_ablations() -> Iterator[Merge]:
    """Variations of one setting at a time, or of two that belong together."""

    def row(group: str, name: str, recipe: Mapping[str, Any] | None = None, **parameters: Any) -> Merge:
        return Merge(name=f"{group}: {name}", group=group, method="actmat", parameters=parameters, recipe=recipe or {})

    for anchor in ("mean", "base", "sum"):
        for ridge in RIDGES if anchor == "mean" else RIDGES[2::2]:
            yield row("ridge", f"{anchor} {ridge:g}", ridge=ridge, anchor=anchor)
    for exponent in (0.0, 0.5, 1.0):
        for anchor in ("mean", "sum"):
            yield row("weights", f"{anchor} p={exponent:g}", weight_exponent=exponent, anchor=anchor)
    for ridge in (1e-2, 0.1, 1.0):
        yield row("pool", f"mean {ridge:g}", pool="inputs", ridge=ridge)
    yield row("pool", "pinv", pool="inputs", solver="pinv")
    yield row("pool", "sum 0.1", pool="inputs", anchor="sum")
    yield row("embeddings", "averaged")
    yield row("embeddings", "base", {"rules": [{"match": EMBEDDINGS, "keep": "base"}]})
    yield row("embeddings", "merged", {"rules": [{"match": EMBEDDINGS, "merge_method": "actmat"}]})
    yield row("output", "float32", {"out_dtype": "float32"})
    yield row("output", "bfloat16, nearest", {"out_dtype": "bfloat16"})
    yield row("output", "bfloat16, stochastic", {"out_dtype": "bfloat16", "rounding": "stochastic"})


def of_training() -> Iterator[Merge]:
    """What is looked at of adapters that were trained in other ways."""
    wanted = (*of_table(), *of_adapters())
    return (merge for merge in wanted if merge.name in BY_TRAINING)


def of_adapters() -> Iterator[Merge]:
    """How far ACTMat holds the covariances of adapters back."""
    for adapters, ridges in (("hold", (0.01, 0.03, 0.1, 0.3, 1.0)), ("trust", (0.1, 1.0, 10.0))):
        for ridge in ridges:
            parameters = {"adapters": adapters, "ridge": ridge}
            yield Merge(
                name=f"adapters: {adapters} {ridge:g}", group="adapters", method="actmat", parameters=parameters
            )


def of_counts(counts: Sequence[int] = (2, 4, 6)) -> Iterator[Merge]:
    """The first few experts, by four methods."""
    compared = {"average": "linear", "TIES": "ties", "TSV": "tsv", "ACTMat": "actmat"}
    for count in counts:
        for name, method in compared.items():
            parameters = TIES if method == "ties" else {}
            yield Merge(
                name=f"experts: {count} {name}", group="experts", method=method, parameters=parameters, experts=count
            )


def of_ideas() -> Iterator[Merge]:
    """What the lab tries beyond the product, by `quality.blended`."""
    methods.METHODS["blended"] = "quality.blended"
    for name, parameters in IDEAS.items():
        yield Merge(name=f"idea: {name}", group="ideas", method="blended", parameters=parameters)


def of_estimates() -> Iterator[Merge]:
    """ACTMat's formula with other guesses at the covariances, which `regmean` takes for measured ones."""
    for estimate in ("own", "epochs", "neighbours"):
        for ridge in (0.1, 0.01):
            yield Merge(
                name=f"idea: covariance {estimate}, {ridge:g}",
                group="ideas",
                method="regmean",
                parameters={"solver": "ridge", "ridge": ridge, "reduce": 1.0},
                estimate=estimate,
            )


def of_lengths() -> Iterator[Merge]:
    """Experts trained for unequal times."""
    for exponent in (0.0, 0.5, 1.0):
        for anchor in ("mean", "sum"):
            yield Merge(
                name=f"lengths: ACTMat {anchor} p={exponent:g}",
                group="lengths",
                method="actmat",
                parameters={"anchor": anchor, "weight_exponent": exponent},
            )
    for name, method in (("average", "linear"), ("TSV", "tsv"), ("Iso-C", "iso_c"), ("WUDI", "wudi")):
        yield Merge(name=f"lengths: {name}", group="lengths", method=method)
