"""The report: figures that add up, a summary that says what a person must know."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import streammerge
from streammerge.errors import OutputError
from streammerge.outcome import Outcome
from streammerge.report import Report, Seconds, parse_report
from tests.models import recipe_of
from tests.stored import tensors_of


def report(*outcomes: Outcome, resumed: int = 0) -> Report:
    return Report(
        out="out",
        recipe={"merge_method": "linear"},
        tensors=outcomes,
        checksums={outcome.name: "0" * 64 for outcome in outcomes},
        read_bytes=3 << 20,
        written_bytes=1 << 20,
        resumed_tensors=resumed,
        memory={"budget": 1},
        seconds=Seconds(wall=10.0, waiting_for_input=2.0, waiting_for_output=1.0, reading=4.0, writing=3.0),
        versions={"streammerge": "0"},
    )


def test_computing_is_what_was_not_waiting():
    assert report().seconds.computing == 7.0


def test_a_report_reads_back():
    text = report(Outcome("a", "linear", {"rank": 3}), Outcome("b", "copy")).to_json()
    table = parse_report(text, "`x`")
    assert [tensor["name"] for tensor in table["tensors"]] == ["a", "b"]
    assert table["tensors"][0]["facts"] == {"rank": 3}
    assert table["totals"] == {
        "tensors": 2, "resumed_tensors": 0, "read_bytes": 3 << 20, "written_bytes": 1 << 20, "elapsed_seconds": 10.0,
    }  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_reports_text_is_its_values_with_a_line_for_each_tensor(count):
    outcomes = [
        Outcome(f't "{i}"', "linear", {"rank": i}, shape=[i, 2], expert_norms=[None, 0.5]) for i in range(count)
    ]
    found = report(*outcomes)
    text = found.to_json()
    assert json.loads(text) == found.to_dict()
    assert [json.loads(line.strip().rstrip(",")) for line in text.splitlines() if '"sha256"' in line] == [
        {**dataclasses.asdict(outcome), "sha256": found.checksums[outcome.name]} for outcome in outcomes
    ]


def test_the_summary_of_a_plain_merge_is_one_line():
    assert report(Outcome("a", "linear")).summary() == "merged 1 tensor into out: 1.0 MiB in 10.0 s"
    assert report(Outcome("a", "linear"), Outcome("b", "copy")).summary().startswith("merged 2 tensors into out")


def test_the_summary_tells_of_what_was_already_there():
    assert report(Outcome("a", "linear"), resumed=1).summary().splitlines()[1] == "1 of them were already there"


def test_the_least_certain_solve_is_named():
    outcomes = [Outcome(name, "actmat", {"certificate": value}) for name, value in (("a", 1e-7), ("b", 3e-4))]
    found = report(*outcomes, Outcome("c", "linear"))
    assert found.worst_certificate == ("b", 3e-4)
    assert "least certain solve: `b`, estimated relative error 3.0e-04" in found.summary()
    assert found.to_dict()["worst_certificate"] == {"name": "b", "certificate": 3e-4}
    assert report(Outcome("c", "linear")).worst_certificate is None


def test_the_summary_warns_where_rounding_took_much_of_the_change():
    outcomes = [Outcome(name, "linear", rounding_loss=loss) for name, loss in (("a", 0.3), ("b", 0.6), ("c", 0.1))]
    assert report(*outcomes).summary().splitlines()[1] == (
        "rounding took more than a quarter of the merged change from 2 tensors, most from `b` (60%); "
        "`rounding: stochastic` or `out_dtype: float32` keeps it"
    )


def test_names_from_outside_cannot_act_on_the_terminal():
    assert "\x1b" not in report(Outcome("\x1b[2J", "linear", rounding_loss=0.9)).summary()


def test_what_is_not_json_is_no_report():
    with pytest.raises(OutputError, match="`x` is not a report of streammerge"):
        parse_report("{]", "`x`")


def test_a_merges_report_is_what_lies_beside_the_model(family, tmp_path):
    found = streammerge.merge(recipe_of(family, "task_arithmetic"), tmp_path / "out")
    table = json.loads(Path(tmp_path / "out" / "streammerge.json").read_text())
    assert table == json.loads(found.to_json())
    assert table["recipe"]["merge_method"] == "task_arithmetic"
    assert {tensor["name"] for tensor in table["tensors"]} == tensors_of(tmp_path / "out").keys()
    assert table["versions"].keys() >= {"python", "torch"}
    seconds = table["seconds"]
    assert seconds["wall"] >= seconds["waiting_for_input"] + seconds["waiting_for_output"]
    assert table["totals"]["read_bytes"] == streammerge.plan(recipe_of(family, "task_arithmetic")).read_bytes
