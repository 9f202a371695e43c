"""The page about a merge: true to `streammerge.json`, harmless whatever that holds, small, and fit to be looked at."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import streammerge
from streammerge import api
from streammerge.cli import cli
from streammerge.errors import OutputError
from streammerge.reporting import style
from streammerge.reporting.comparison_page import comparison_page
from streammerge.reporting.facts import read_merge
from streammerge.reporting.grid import MOST_COLUMNS, MOST_ROWS, OTHERS, gridded, kind_of, labels
from streammerge.reporting.markup import Html, element, number, percent, prose, seconds, text
from streammerge.reporting.merge_page import MOST_TENSORS, length, merge_page
from streammerge.reporting.pictures import Line, Scale, chart
from tests.models import recipe_of
from tests.pages import (
    HOSTILE,
    assert_no_wider,
    assert_shown_light_and_dark,
    assert_stands_alone,
    needs_browser,
    parsed,
    sections,
)


def tensor(name, **more):
    facts = more.pop("facts", {"certificate": 1e-6, "interference": 0.4, "effective_rank": 12.0, "escalation": "none"})
    told = {
        "name": name, "method": "actmat", "facts": facts, "norm_ratio": 0.8, "rounding_loss": 0.01, "changed": 0.9,
        "growth": 0.7, "non_finite": 0, "non_finite_inputs": 0, "seconds": 0.25, "kind": "matrix", "shape": [8, 8],
        "base_norm": 2.0, "expert_norms": [0.1, 0.2], "sha256": "0" * 64,
    }  # fmt: skip
    return {**told, **more}


def table_of(*tensors, **more):
    return {
        "format": 1,
        "recipe": {"merge_method": "actmat", "base_model": "b", "models": [{"model": "x/math"}, {"model": "x/code"}]},
        "totals": {"tensors": len(tensors), "resumed_tensors": 0, "read_bytes": 3 << 30, "written_bytes": 1 << 30},
        "warnings": [],
        "device": "cpu",
        "memory_bytes": {"budget": 2 << 30, "planned": 1 << 30},
        "memory_samples": [[0.0, 0], [1.0, 700 << 20], [2.0, 600 << 20]],
        "seconds": {"wall": 10.0, "computing": 7.0, "waiting_for_input": 2.0, "waiting_for_output": 1.0, "reading": 4.0,
                    "writing": 3.0},
        "versions": {"streammerge": "0.1.0"},
        "tensors": list(tensors),
        **more,
    }  # fmt: skip


def folder(path, table, results=None):
    path.mkdir(exist_ok=True)
    (path / "streammerge.json").write_text(json.dumps(table))
    if results is not None:
        (path / "results.json").write_text(json.dumps(results))
    return path


def llama(layers, value=lambda layer, kind: 0.4):
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    return [
        tensor(f"model.layers.{layer}.{kind}.weight", facts={"interference": value(layer, kind), "certificate": 1e-6})
        for layer in range(layers)
        for kind in kinds
    ]


@pytest.fixture
def merged(family, tmp_path):
    out = tmp_path / "merged"
    api.merge(recipe_of(family), out)
    return out


def test_a_real_merges_page_says_what_its_report_says(merged):
    table = json.loads((merged / "streammerge.json").read_text())
    page = merge_page(read_merge(merged))
    assert_stands_alone(page)
    found = sections(parsed(page))
    by_name = {entry["name"]: entry for entry in table["tensors"]}
    interference = found["Interference"].all("table")[0]
    assert interference.rows[0] == [
        "layer",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    for layer, *cells in interference.rows[1:]:
        for kind, cell in zip(interference.rows[0][1:], cells, strict=True):
            part = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            entry = by_name[f"model.layers.{layer}.{part}.{kind}.weight"]
            assert cell == f"{entry['facts']['interference']:.2f}"
    assert [row[0] for row in interference.rows[1:]] == ["0", "1"]
    every = found["Every tensor"].all("table")[0].rows
    assert [row[0] for row in every[1:]] == [entry["name"] for entry in table["tensors"]]
    assert [row[3] for row in every[1:]] == [length(entry["norm_ratio"]) for entry in table["tensors"]]
    assert [row[4] for row in every[1:]] == [percent(entry["rounding_loss"]) for entry in table["tensors"]]
    assert "merge_method: actmat" in found["Recipe"].text


def test_what_a_merge_writes_down_is_true_to_the_tensors(family, merged):
    from tests.stored import tensors_of

    table = json.loads((merged / "streammerge.json").read_text())
    models = [tensors_of(path) for path in family.values()]
    for entry in table["tensors"]:
        if entry["method"] == "copy":
            assert (entry["base_norm"], entry["expert_norms"]) == (None, [])
            continue
        base, *experts = (model[entry["name"]].double() for model in models)
        assert entry["shape"] == list(base.shape)
        assert entry["base_norm"] == pytest.approx(base.norm().item(), rel=1e-5)
        assert entry["expert_norms"] == pytest.approx([(e - base).norm().item() for e in experts], rel=1e-5)


def test_memory_was_sampled_during_the_merge(merged):
    samples = json.loads((merged / "streammerge.json").read_text())["memory_samples"]
    assert len(samples) >= 2
    assert all(held < 1 << 30 for _, held in samples)
    assert [second for second, _ in samples] == sorted(second for second, _ in samples)


def test_each_expert_has_its_line_and_its_numbers(tmp_path):
    tensors = [tensor(f"layers.{i}.q_proj.weight", base_norm=2.0, expert_norms=[0.1 * (i + 1), 0.4]) for i in range(3)]
    found = sections(parsed(merge_page(read_merge(folder(tmp_path / "a", table_of(*tensors))))))
    norms = found["How far each expert went"]
    assert [item.text for item in norms.all("li")] == ["math", "code"]
    assert norms.all("table")[0].rows == [
        ["layer", "math", "code"], ["0", "5.0 %", "20 %"], ["1", "10 %", "20 %"], ["2", "15 %", "20 %"],
    ]  # fmt: skip
    first, second = (line.attributes["points"].split() for line in norms.all("polyline"))
    heights = [float(point.split(",")[1]) for point in first]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert heights[0] > heights[2] > float(second[0].split(",")[1])


def test_time_memory_warnings_and_results_are_there(tmp_path):
    table = table_of(
        tensor("layers.0.q_proj.weight", facts={"escalation": "float64"}), warnings=["something is `large`"]
    )
    results = {"tasks": {"gsm8k": {"accuracy": 0.41256}}, "version": 3}
    page = merge_page(read_merge(folder(tmp_path / "a", table, results)))
    found = sections(parsed(page))
    assert [row[:2] for row in found["Time"].all("table")[0].rows] == [
        ["computing", "7.0 s"], ["waiting for input", "2.0 s"], ["waiting for output", "1.0 s"],
        ["reading, meanwhile", "4.0 s"], ["writing, meanwhile", "3.0 s"],
    ]  # fmt: skip
    widths = [float(bar.attributes["width"]) for bar in found["Time"].all("rect")]
    assert widths == pytest.approx([200.0 * share / 7 for share in (7, 2, 1, 4, 3)], abs=0.1)
    assert "at most 700.0 MiB, under the budget of 2.0 GiB" in found["Memory"].text
    heights = [mark.text for mark in found["Memory"].all("text") if mark.attributes["text-anchor"] == "end"]
    assert heights == [
        "0 B",
        "512.0 MiB",
        "1.0 GiB",
        "1.5 GiB",
        "2.0 GiB",
        "2.0 s",
        "planned 1.0 GiB",
        "budget 2.0 GiB",
    ]
    assert [item.text for item in found["Warnings"].all("li")] == [
        "something is large", "1 solves went on in float64, the first of them layers.0.q_proj.weight",
    ]  # fmt: skip
    assert [code.text for code in found["Warnings"].all("code")] == ["large"]
    assert found["Results"].all("table")[0].rows == [["task", "metric", "value"], ["gsm8k", "accuracy", "0.4126"]]


def test_every_picture_says_what_to_see_and_can_be_had_as_text(tmp_path):
    page = parsed(merge_page(read_merge(folder(tmp_path / "a", table_of(*llama(3))))))
    for section in page.all("section"):
        pictures = [svg for svg in section.all("svg") if svg.attributes.get("role") == "img"]
        assert all(picture.attributes["aria-label"] for picture in pictures)
        if pictures or section.all("table"):
            assert section.all("p")[0].text.endswith(".")
    for svg in page.all("svg"):
        assert svg.attributes.get("role") == "img" or svg.attributes.get("aria-hidden") == "true"
    for region in page.all("div"):
        if region.attributes.get("role") == "region":
            assert region.attributes["tabindex"] == "0"
            assert region.attributes["aria-label"]
    for cell in (cell for table in page.all("table") for cell in table.all("th")):
        assert cell.attributes["scope"] in ("row", "col")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_text(tmp_path, hostile):
    table = table_of(
        tensor(f"model.layers.0.{hostile}.q_proj.weight", method=hostile, facts={"escalation": hostile}),
        tensor(hostile, kind=hostile),
        recipe={"merge_method": hostile, "models": [{"model": hostile}], hostile: hostile},
        warnings=[hostile],
        device=hostile,
        versions={hostile: hostile},
    )
    results = {"tasks": {hostile: {hostile: 1.0}}}
    first = folder(tmp_path / "a", table, results)
    second = folder(tmp_path / "b", table, results)
    for page in (
        merge_page(read_merge(first, hostile)),
        comparison_page([read_merge(first, hostile), read_merge(second)]),
    ):
        assert_stands_alone(page)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2028\ufeff]", page)
        plain = parsed(page)
        assert [title.text for title in plain.all("title")] == [plain.all("h1")[0].text]


@given(st.text(), st.text())
def test_text_and_attributes_read_back_as_they_were_but_for_what_cannot_be_seen(written, title):
    whole = element("p", written, title=title)
    (found,) = parsed(whole).all("p")
    for told, original in ((found.text, written), (found.attributes["title"], title)):
        visible = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in original)
        assert (told or "") == visible
    assert text(written).isprintable() or "\n" in written
    assert isinstance(whole, Html)


def test_backticks_become_code_and_odd_ones_stay():
    assert prose("set `a<b` now") == "set <code>a&lt;b</code> now"
    assert prose("a ` b") == "a ` b"


@pytest.mark.parametrize(
    "broken",
    [
        "{]", "[]", "null", '{"format": 2, "tensors": []}', '{"format": 1}', '{"format": 1, "tensors": {}}',
        '{"format": 1, "tensors": [{"name": 3}]}', '{"format": 1, "tensors": [7]}', "[" * 100_000, "\xff",
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path, broken):
    (tmp_path / "streammerge.json").write_bytes(broken.encode("latin-1"))
    with pytest.raises(OutputError, match=r"`.*streammerge\.json` (is not|has a tensor)"):
        read_merge(tmp_path)


def test_a_folder_without_a_report_and_a_pipe_in_its_place_are_refused(tmp_path):
    with pytest.raises(OutputError, match="does not exist") as caught:
        read_merge(tmp_path)
    assert caught.value.hint == "Name folders that `streammerge merge` wrote."
    os.mkfifo(tmp_path / "streammerge.json")
    with pytest.raises(OutputError, match="is not a plain file"):
        read_merge(tmp_path)


def test_a_recipe_without_end_is_cut(tmp_path):
    recipe = {"merge_method": "actmat", "name": "x" * 3_000_000}
    page = merge_page(read_merge(folder(tmp_path / "a", table_of(tensor("a"), recipe=recipe))))
    assert len(page) < 60_000


def nested(path, depth):
    """A report whose recipe is nested so deep."""
    deep = '{"a": ' * depth + "1" + "}" * depth
    text = json.dumps(table_of(tensor("a"), recipe={"a": 1})).replace('{"a": 1}', deep)
    (path / "streammerge.json").write_text(text)
    return path


@pytest.mark.parametrize("depth", [10, 50, 500])
def test_a_nested_recipe_is_shown_or_cut(tmp_path, depth):
    assert len(merge_page(read_merge(nested(tmp_path, depth)))) < 60_000


def test_a_recipe_nested_without_end_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"is nested too deep|is not JSON") as caught:
        read_merge(nested(tmp_path, 100_000))
    assert caught.value.hint == "The file is damaged: merge again."


def test_results_and_warnings_without_end_are_cut(tmp_path):
    results = {"tasks": {f"task {i}": {"accuracy": 0.5} for i in range(5000)}}
    table = table_of(tensor("a"), warnings=[f"warning {i}" for i in range(5000)])
    page = merge_page(read_merge(folder(tmp_path / "a", table, results)))
    found = sections(parsed(page))
    assert len(found["Results"].all("table")[0].rows) == 201
    assert "The first 200 of 5,000." in found["Results"].text
    assert [item.text for item in found["Warnings"].all("li")][99:] == ["warning 99", "and 4,900 more"]


@pytest.mark.parametrize("value", [True, "1", None, [], {}, float("nan"), float("inf"), -1.0, 10**400])
def test_numbers_that_are_none_are_not_shown(tmp_path, value):
    entry = tensor("layers.0.q_proj.weight", norm_ratio=value, rounding_loss=value, seconds=value, base_norm=value,
                   expert_norms=[value], facts={"interference": value, "certificate": value})  # fmt: skip
    table = table_of(entry, seconds={"wall": value}, memory_samples=[[value, value], value], totals=value)
    page = merge_page(read_merge(folder(tmp_path / "a", table)))
    assert sections(parsed(page))["Every tensor"].all("table")[0].rows[1][2:] == ["–", "–", "–", "–", "–"]
    assert "Interference" not in sections(parsed(page))
    assert "nan" not in page.partition("<main>")[2].lower().replace("resonan", "")


@pytest.mark.parametrize(
    "broken",
    [{"tasks": 3}, {"tasks": {"a": 3}}, {"tasks": {"a": {"b": "c"}}}, {"tasks": {"a": {"b": float("nan")}}}, {}, []],
)
def test_results_that_are_none_are_refused(tmp_path, broken):
    with pytest.raises(OutputError, match=r"results\.json`") as caught:
        read_merge(folder(tmp_path / "a", table_of(tensor("a")), broken))
    assert caught.value.hint


def test_results_of_several_files_stand_together(tmp_path):
    path = folder(tmp_path / "a", table_of(tensor("a")), {"tasks": {"code": {"loss": 1.0}}})
    (path / "results-later.json").write_text(json.dumps({"tasks": {"code": {"loss": 2.0}, "math": {"loss": 3.0}}}))
    assert read_merge(path).results == {
        "code": {"loss": 2.0}, "math": {"loss": 3.0}, "code (results)": {"loss": 1.0},
    }  # fmt: skip


def test_a_page_of_a_7b_model_is_small(tmp_path):
    tensors = [*llama(36), *(tensor(f"model.layers.{i}.input_layernorm.weight", kind="vector") for i in range(72))]
    page = merge_page(read_merge(folder(tmp_path / "a", table_of(*tensors))))
    assert len(tensors) > 320
    assert len(page.encode()) < 500_000


def test_a_page_of_18000_tensors_is_small_and_shows_the_worst(tmp_path):
    tensors = [
        tensor(
            f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight",
            facts={"interference": (layer + expert) / 200},
            growth=9.0 if (layer, expert, kind) == (7, 90, "up_proj") else 0.5,
        )
        for layer in range(48)
        for expert in range(128)
        for kind in ("gate_proj", "up_proj", "down_proj")
    ]
    page = merge_page(read_merge(folder(tmp_path / "a", table_of(*tensors))))
    assert len(tensors) > 18_000
    assert len(page.encode()) < 500_000
    found = sections(parsed(page))
    heat = found["Interference"].all("table")[0]
    assert heat.rows[0] == ["layer", "gate_proj", "up_proj", "down_proj"]
    assert heat.rows[8] == ["7", *[f"{134 / 200:.2f}"] * 3]
    assert heat.all("td")[3 * 7].attributes["title"].endswith("experts.127.gate_proj.weight, the most of 128")
    few = found[f"{MOST_TENSORS} of 18,432 tensors"].all("table")[0]
    assert len(few.rows) == 1 + MOST_TENSORS
    assert few.rows[1][0] == "model.layers.7.mlp.experts.90.up_proj.weight"


def test_names_without_end_and_without_order_are_cut_and_gathered(tmp_path):
    tensors = [tensor(f"model.layers.{i}.{'x' * 5000}{chr(97 + i % 26)}{i % 30}.weight") for i in range(2000)]
    tensors += [tensor(f"{'y' * 5000}{chr(97 + i % 26)}{chr(97 + i // 26)}") for i in range(300)]
    page = merge_page(read_merge(folder(tmp_path / "a", table_of(*tensors))))
    assert len(page.encode()) < 2_000_000
    heat, outside = sections(parsed(page))["Interference"].all("table")
    assert len(heat.rows) <= MOST_ROWS + 1
    assert len(heat.rows[0]) == MOST_COLUMNS + 1
    assert heat.rows[0][-1] == OTHERS
    assert len(outside.rows) == MOST_COLUMNS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.q_proj.weight", (11, "model.layers.*.self_attn.q_proj")),
        ("model.layers.3.mlp.experts.17.up_proj.weight", (3, "model.layers.*.mlp.experts.*.up_proj")),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", (2, "encoder.block.*.layer.*.SelfAttention.q")),
        ("lm_head.weight", (None, "lm_head")),
        ("transformer.h.0.attn.c_attn.bias", (0, "transformer.h.*.attn.c_attn.bias")),
    ],
)
def test_a_name_tells_layer_and_kind(name, expected):
    assert kind_of(name) == expected


def test_labels_are_as_short_as_they_can_be():
    assert labels(["a.mlp.wo", "a.attn.wo", "a.attn.q"]) == ["mlp.wo", "attn.wo", "q"]


def test_a_grid_keeps_every_value_in_some_cell():
    class Named:
        def __init__(self, name, value):
            self.name, self.value = name, value

    tensors = [Named(f"layers.{i}.q_proj.weight", float(i)) for i in range(250)]
    grid = gridded(tensors, lambda tensor: tensor.value)
    assert len(grid.rows) <= MOST_ROWS
    assert grid.rows[0] == "0–2"
    assert sum(cell.count for cell in grid.cells.values()) == 250
    assert max(grid.values) == 249.0


def test_scales_use_all_their_colours_and_no_other():
    scale = Scale(0.0, 1.0)
    assert [scale.step(value / 9 + 0.01) for value in range(9)] == list(range(style.STEPS))
    assert (scale.step(-1.0), scale.step(1.0), scale.step(7.0)) == (0, 8, 8)
    assert Scale(3.0, 3.0).step(3.0) == 0
    logarithmic = Scale(1e-8, 1e-4, logarithmic=True)
    assert (logarithmic.step(0.0), logarithmic.step(1e-8), logarithmic.step(1e-6), logarithmic.step(1e-4)) == (
        0,
        0,
        4,
        8,
    )


@pytest.mark.parametrize("points", [[], [(0.0, 0.0)], [(0.0, 1e-300), (1.0, 0.0)], [(5.0, 1e300), (5.0, 2.0)]])
def test_charts_of_strange_values_hold_finite_points(points):
    drawn = chart([Line("a", points)], "a", shown=number, across="x")
    for line in parsed(drawn).all("polyline"):
        assert all(math.isfinite(float(x)) for point in line.attributes["points"].split() for x in point.split(","))
    assert bool(drawn) == bool(points)


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("page", "heat", "lines"),
    [
        (style.PAGE_LIGHT, style.HEAT_LIGHT, style.LINES_LIGHT),
        (style.PAGE_DARK, style.HEAT_DARK, style.LINES_DARK),
    ],
    ids=["light", "dark"],
)
def test_colours_can_be_read(page, heat, lines):
    back, front, muted, _, mark = page
    assert all(contrast(back, colour) >= 4.5 for colour in (front, muted, mark))
    assert all(contrast(*pair) >= 4.5 for pair in heat)
    assert all(contrast(back, colour) >= 4.5 for colour in lines)
    steps = [luminance(colour) for colour, _ in heat]
    assert steps == sorted(steps, reverse=back == style.PAGE_LIGHT[0])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0, "0"), (1.0, "1"), (0.12345, "0.123"), (123456.0, "123,456"), (1e-7, "1.0e-7"), (-0.5, "-0.5")],
)
def test_numbers_are_short(value, shown):
    assert number(value) == shown


def test_shares_and_times_have_units():
    assert [percent(value) for value in (0.0, 0.00001, 0.012, 0.5)] == ["0 %", "0.001 %", "1.2 %", "50 %"]
    assert [seconds(value) for value in (0.002, 1.23, 150.0, 3600.0)] == ["2 ms", "1.2 s", "150 s", "60 min"]


def test_a_comparison_has_a_column_for_each_and_one_scale(tmp_path):
    one = folder(tmp_path / "one", table_of(*llama(4, lambda layer, _: 0.2)), {"tasks": {"t": {"accuracy": 0.5}}})
    two = folder(tmp_path / "two", table_of(*llama(4, lambda layer, _: 0.9 if layer == 3 else 0.4)))
    three = folder(tmp_path / "three", table_of(*(tensor(f"layers.{i}.q_proj.weight", facts={}) for i in range(4))))
    page = comparison_page([read_merge(path) for path in (one, two, three)])
    assert_stands_alone(page)
    found = sections(parsed(page))
    beside = {row[0]: row[1:] for row in found["Side by side"].all("table")[0].rows}
    assert beside[""] == ["one", "two", "three"]
    medians = [statistics.median([0.2]), statistics.median([0.4] * 21 + [0.9] * 7), None]
    assert beside["interference, median"] == [number(value, 2) for value in medians]
    assert beside["time"] == ["10.0 s"] * 3
    assert found["Results"].all("table")[0].rows[1] == ["t", "accuracy", "0.5", "–", "–"]
    interference = found["Interference"]
    assert "Not measured for three; streammerge diagnose --merged measures it for any method." in interference.text
    first, second = interference.all("table")
    assert [title.text for title in interference.all("h3")] == ["one", "two"]
    assert {cell.attributes["class"] for cell in first.all("td")} == {f"q{Scale(0.0, 1.0).step(0.2)}"}
    assert {cell.attributes["class"] for cell in second.all("td")} == {
        f"q{Scale(0.0, 1.0).step(v)}" for v in (0.4, 0.9)
    }
    flat, rising = (line.attributes["points"].split() for line in interference.all("polyline"))
    assert len({point.split(",")[1] for point in flat}) == 1
    assert float(rising[3].split(",")[1]) < float(rising[0].split(",")[1]) < float(flat[0].split(",")[1])


def test_the_command_writes_one_page_or_a_comparison(merged, tmp_path):
    runner = CliRunner()
    done = runner.invoke(cli, ["report", str(merged)], catch_exceptions=False)
    assert done.output == f"{merged / 'report.html'}\n"
    assert "Merge report: merged" in (merged / "report.html").read_text()
    again = shutil.copytree(merged, tmp_path / "other" / "merged")
    page = tmp_path / "many.html"
    runner.invoke(cli, ["report", str(merged), str(again), "-o", str(page)], catch_exceptions=False)
    heads = sections(parsed(page.read_text()))["Side by side"].all("table")[0].rows[0]
    assert heads == ["", str(merged), str(again)]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_page_beside_the_weights_does_not_trouble_a_verification(merged):
    api.report(merged, page=merged / "report.html")
    assert not streammerge.verify(merged).problems


def test_a_page_that_cannot_be_written_leaves_nothing(merged, tmp_path):
    with pytest.raises(OutputError, match="cannot be written: no such file or directory") as caught:
        api.report(merged, page=tmp_path / "not" / "there.html")
    assert caught.value.hint == "Choose another file with `-o`."
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="cannot be written: is a directory"):
        api.report(merged, page=tmp_path / "taken")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.fixture
def pages(tmp_path):
    one = folder(tmp_path / "one", table_of(*llama(32), tensor(HOSTILE[0], kind="vector"), warnings=list(HOSTILE)))
    two = folder(tmp_path / "two", table_of(*llama(32)))
    files = {"merge": tmp_path / "merge.html", "comparison": tmp_path / "comparison.html"}
    api.report(one, page=files["merge"])
    api.report(one, two, page=files["comparison"])
    return files


@needs_browser
@pytest.mark.parametrize("which", ["merge", "comparison"])
def test_a_browser_shows_it_light_or_dark_and_runs_nothing(pages, tmp_path, which):
    assert_shown_light_and_dark(pages[which], tmp_path)


@needs_browser
@pytest.mark.parametrize("which", ["merge", "comparison"])
@pytest.mark.parametrize("width", [360, 1100])
def test_no_page_is_wider_than_its_window(pages, tmp_path, which, width):
    assert_no_wider(pages[which], tmp_path, width)


def test_paths_are_any_paths(tmp_path):
    path = folder(tmp_path / "a", table_of(tensor("a")))
    assert read_merge(str(path)).label == read_merge(Path(path)).label == "a"
