"""No setting is found wrong after a byte was read: each is refused where the recipe says it, or by the plan."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import streammerge
from streammerge import methods
from streammerge.delta import TensorDeltas
from streammerge.errors import MergeError, RecipeError, StreamMergeError
from streammerge.methods import Method, Parameter, describe
from streammerge.recipe import Recipe
from tests.models import llama_tensors
from tests.stored import MemoryStorage, streamed_tensors
from tests.test_device_stream import planned
from tests.test_every_method import ONE_EXPERT, PARAMETERS, beside_of, every_method, experts_of, storage_for

DROPPING = ("dare_linear", "della_linear", "breadcrumbs")
WRAPPERS = ("knots", "svc", "larv")


def bounded() -> list[tuple[str, str]]:
    return [(m, p.name) for m in methods.names() for p in describe(m).parameters.values() if p.interval]


every_bounded = pytest.mark.parametrize(("method", "parameter"), bounded())


def outside(parameter: Parameter) -> Iterator[float]:
    """Numbers that are just out of its range, and far out."""
    interval = parameter.interval
    assert interval
    yield interval.least - 1 if interval.with_least or parameter.type == "int" else interval.least
    yield -1e300 if parameter.type == "float" else -(10**20)
    if math.isfinite(interval.most):
        yield interval.most + (1e-6 if interval.with_most else 0)


def wrong(parameter: Parameter) -> list[object]:
    """Values of no kind that it takes."""
    if parameter.type == "settings":
        return [3, "much", [1.0], {"no such setting": 1}]
    if parameter.type == "method":
        return [3, "liner", ["ties"], True]
    if parameter.choices:
        return [3, "no such choice", ["none"], True]
    if parameter.type == "bool":
        return ["much", 2, [True], {"value": True}]
    kinds = [
        "much",
        True,
        [],
        [1.0, "much"],
        {"value": 1.0},
        [{"value": "much"}],
        math.nan,
        math.inf,
        [{"filter": "q"}],
    ]
    return [*kinds, 1.5] if parameter.type == "int" else kinds


def recipe(method: str, parameters: dict[str, Any], **more: object) -> dict[str, object]:
    beside = describe(method).beside
    models = [{"model": f"expert{n}", **({beside: "data"} if beside else {})} for n in range(experts_of(method))]
    return {"merge_method": method, "base_model": "base", "models": models, "parameters": parameters, **more}


def refused(mapping: dict[str, object], place: str, parameter: str) -> RecipeError:
    with pytest.raises(RecipeError) as raised:
        Recipe.from_dict(mapping)
    assert raised.value.message.startswith(f"recipe.{place}.{parameter}"), raised.value.message
    assert f"explains `{parameter}`" in str(raised.value.hint)
    return raised.value


@every_method
def test_a_value_of_the_wrong_kind_is_refused_where_it_stands(method):
    for parameter in describe(method).parameters.values():
        for value in wrong(parameter):
            with pytest.raises(RecipeError) as raised:
                Recipe.from_dict(recipe(method, {parameter.name: value}))
            assert raised.value.message.startswith(f"recipe.parameters.{parameter.name}"), (parameter.name, value)
            assert raised.value.hint, (parameter.name, value)


@every_bounded
def test_a_number_out_of_range_is_refused_where_it_stands(method, parameter):
    declared = describe(method).parameters[parameter]
    for number in outside(declared):
        written = [
            number,
            [{"filter": "mlp", "value": number}, {"value": declared.default}],
            [declared.default, number],
        ]
        for value in written:
            error = refused(recipe(method, {parameter: value}), "parameters", parameter)
            assert error.message.endswith(f"expected {declared.interval}")
        if describe(method).beside is None:
            rule = {"match": "mlp", "merge_method": method, "parameters": {parameter: number}}
            refused(recipe("linear", {}, rules=[rule]), "rules[0].parameters", parameter)
            inside = recipe("svc", {"rule": method, "rule_parameters": {parameter: number}})
            refused(inside, "parameters.rule_parameters", parameter)
        if declared.per_expert:
            mapping = recipe(method, {})
            mapping["models"][0]["parameters"] = {parameter: number}  # type: ignore[index]
            refused(mapping, "models[0].parameters", parameter)


@every_bounded
def test_the_ends_of_a_range_are_merged(method, parameter):
    """A range is no wider than what the method can do."""
    declared = describe(method).parameters[parameter]
    assert declared.interval
    numbers = [end for end in (declared.interval.least, declared.interval.most) if end in declared.interval]
    storage = storage_for(method)
    for number in numbers or [1e-3]:
        value = int(number) if declared.type == "int" else number
        settings = {**PARAMETERS.get(method, {}), parameter: value}
        if parameter == "ridge":
            settings["solver"] = "exact"
        if method.startswith("della"):
            settings = {"density": 0.5, "epsilon": 0.1} | {parameter: value}
            if parameter == "epsilon" and number == 1.0:
                settings["density"] = 1.0
        if method in ("regmean", "fisher") and parameter == "weight":
            models = [{"model": f"expert{n}", describe(method).beside: "data"} for n in range(3)]
            models[0]["parameters"] = {"weight": value}
            plan = planned(storage, method, models=models, device_bytes=None)
        else:
            models = recipe(method, {})["models"]
            plan = planned(storage, method, models=models, parameters=settings, device_bytes=None)
        assert all(torch.isfinite(t).all() for t in streamed_tensors(plan, storage).values()), number


def weighted(*weights: float) -> list[dict[str, object]]:
    return [{"model": f"expert{n}", "parameters": {"weight": weight}} for n, weight in enumerate(weights)]


CANCEL = "the weights 1, -1 sum to 0 and cannot be normalized"
TOGETHER: dict[str, tuple[dict[str, object], str, str]] = {
    # what the recipe says, where it says it, what is wrong
    **{
        f"{method}: weights that cancel": (
            {"merge_method": method, "models": weighted(1, -1), "parameters": parameters},
            "recipe.models[0].parameters.weight",
            CANCEL,
        )
        for method, parameters in {
            "linear": {},
            "multislerp": {},
            **{name: {"normalize": True} for name in ("task_arithmetic", "fr", *DROPPING)},
        }.items()
    },
    "a curve of weights that cancels at one layer": (
        {
            "merge_method": "linear",
            "models": [
                {"model": "expert0", "parameters": {"weight": [1, 2]}},
                {"model": "expert1", "parameters": {"weight": [1, -2]}},
            ],
        },
        "recipe.models[0].parameters.weight",
        "the weights 2, -2 sum to 0",
    ),
    "weights of nothing in a rule": (
        {
            "merge_method": "actmat",
            "rules": [{"match": "norm", "merge_method": "linear", "parameters": {"weight": 0}}],
        },
        "recipe.rules[0].parameters.weight",
        "the weights 0, 0 sum to 0",
    ),
    **{
        f"{method}: no ridge": (
            {"merge_method": method, "parameters": {"ridge": 0, "solver": "ridge"}},
            "recipe.parameters.ridge",
            "`ridge` is 0, expected more than 0",
        )
        for method in ("actmat", "tact", "wudi")
    },
    **{
        f"{method}: no probabilities": (
            {"merge_method": method, "parameters": {"density": density}},
            "recipe.parameters.density",
            "keep entries with probabilities from",
        )
        for method, density in (("della", 0.9), ("della_linear", 0.1))
    },
    "ace: no direction in the paper's way": (
        {"merge_method": "ace", "parameters": {"compat": "paper", "k_frac": 0.01}},
        "recipe.parameters.k_frac",
        "singular directions are none",
    ),
    **{
        f"ties: {name} that differs": (
            {"merge_method": "ties", "parameters": {"trim": "model", "density": 0.5, **differing}},
            f"recipe.parameters.{name}",
            f"has another `{name}` than",
        )
        for name, differing in {
            "density": {"density": [{"filter": "mlp", "value": 0.2}, {"value": 0.5}]},
            "rescale": {"rescale": [{"filter": "mlp", "value": True}]},
            "keep": {"keep": [{"filter": "mlp", "value": "threshold"}]},
            "cancelled": {"cancelled": [{"filter": "mlp", "value": "majority"}]},
        }.items()
    },
    **{
        f"{wrapper} around {rule}": (
            {"merge_method": wrapper, "parameters": {"rule": rule, **parameters}},
            f"recipe.parameters.{place}",
            message,
        )
        for wrapper in WRAPPERS
        for rule, parameters, place, message in (
            ("slerp", {}, "rule", "`slerp` merges 1 model, found 2"),
            ("regmean", {}, "rule", f"`{wrapper}` cannot wrap `regmean`, which needs a covariance"),
            ("larv", {}, "rule", f"`{wrapper}` cannot wrap `larv`, which looks at the whole model"),
            (
                "ties",
                {"rule_parameters": {"trim": "model", "density": 0.5}},
                "rule_parameters",
                "looks at the whole model",
            ),
            ("della", {"rule_parameters": {"density": 0.9}}, "rule_parameters", "keep entries with probabilities"),
            ("linear", {"rule_parameters": {"weight": 0}}, "rule_parameters", "the weights 0, 0 sum to 0"),
            ("actmat", {"rule_parameters": {"ridge": 0}}, "rule_parameters", "`ridge` is 0"),
        )
    },
}


@pytest.mark.parametrize("case", TOGETHER)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_written(case, tmp_path):
    says, place, message = TOGETHER[case]
    mapping = {"base_model": "base", "models": [{"model": "expert0"}, {"model": "expert1"}], **says}
    with pytest.raises(RecipeError) as raised:
        streammerge.merge(mapping, tmp_path / "out", storage=storage_for("linear"), memory="1GiB")
    assert not list(tmp_path.iterdir())
    assert raised.value.message.startswith(f"{place}: `"), raised.value.message
    assert message in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_data_that_lies_beside_no_expert_is_missed_by_the_plan(method):
    beside = describe(method).beside
    base = llama_tensors()
    data = beside_of(method, base)
    del data["model.layers.1.mlp.up_proj.weight"]
    storage = MemoryStorage({"base": base, "expert0": base, "expert1": base, "data": data})
    models = [{"model": f"expert{n}", beside: "data"} for n in range(2)]
    mapping = {"merge_method": method, "base_model": "base", "models": models}
    with pytest.raises(StreamMergeError) as raised:
        streammerge.plan(mapping, storage=storage, memory="1GiB")
    assert raised.value.message.startswith(f"2 tensor(s) have no {beside} beside them")
    assert "`model.layers.1.mlp.up_proj.weight` of `expert1`" in raised.value.message
    assert "missing: mean" in str(raised.value.hint)
    streammerge.plan({**mapping, "parameters": {"missing": "mean"}}, storage=storage, memory="1GiB")
    with pytest.raises(RecipeError, match="the weights are 0, 0, expected one above 0"):
        streammerge.plan({**mapping, "parameters": {"missing": "mean", "weight": 0}}, storage=storage, memory="1GiB")


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_rule_cannot_ask_for_data_that_the_recipe_does_not_name(method):
    rule = {"match": "mlp", "merge_method": method}
    with pytest.raises(RecipeError, match=rf"recipe\.rules\[0\]\.merge_method: method `{method}` needs a") as raised:
        Recipe.from_dict(recipe("linear", {}, rules=[rule]))
    assert "merge_method" in str(raised.value.hint)


@pytest.mark.parametrize("name", methods.names())
def test_what_is_declared_of_parameters_is_about_parameters(name):
    method: Method = describe(name)
    assert set(method.one_for_all) <= set(method.parameters)
    for parameter, path in method.check_paths.items():
        module, _, function = path.partition(":")
        assert parameter in method.parameters
        assert callable(getattr(importlib.import_module(module), function))
    experts = 1 if name in ONE_EXPERT else 2
    assert method.complaint((64, 32), experts, {}) is None


def test_without_a_plan_a_method_refuses_what_a_plan_would():
    deltas = TensorDeltas(torch.zeros(3, 4), [torch.ones(3, 4)] * 2, name="layer.weight")
    for method, settings, message in (
        ("ties", {"density": [0.5, 2.0]}, "`density` is 2, expected 0 to 1"),
        ("linear", {"weight": (1.0, -1.0)}, CANCEL),
        ("nearswap", {}, "`nearswap` merges 1 model, found 2"),
        ("ace", {"compat": "paper"}, "0.3 of 3 singular directions are none"),
    ):
        with pytest.raises(MergeError) as raised:
            describe(method).merge(deltas, **settings)
        assert raised.value.message.startswith(f"`layer.weight`: {message}")
        assert raised.value.hint
