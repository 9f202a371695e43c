"""The page of a batch: there at any time, true to the ledger, cheap, harmless, and never a batch's end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from streammerge import api
from streammerge.batching import page as batch_page_module
from streammerge.batching.ledger import Ledger
from streammerge.batching.night import read_night
from streammerge.batching.page import settings_of
from streammerge.errors import RecipeError
from streammerge.reporting.batch_page import BatchFacts, JobFacts, batch_page
from streammerge.reporting.facts import read_merge
from streammerge.reporting.markup import number
from streammerge.reporting.merge_page import size
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
from tests.test_batch import SCORE, grid, write_night
from tests.test_html_report import folder, llama, table_of


def shown(path: Path) -> dict[str, list[list[str]]]:
    """The rows of each section's first table."""
    text = path.read_text()
    assert_stands_alone(text)
    found = sections(parsed(text))
    return {title: part.all("table")[0].rows if part.all("table") else [[part.text]] for title, part in found.items()}


def statuses(path: Path) -> dict[str, str]:
    return {row[0]: row[1] for row in shown(path)["Jobs"][1:]}


def test_the_page_tells_of_every_job_what_the_ledger_knows(family, tmp_path):
    path = write_night(
        tmp_path,
        [grid(family), {"recipe": recipe_of(family, "linear")}],
        evaluate={"command": SCORE},
        keep={"best": 2, "by": "command.size", "order": "min"},
    )
    assert not api.batch(path).failed
    page = tmp_path / "night" / "report.html"
    found = shown(page)
    head, *rows = found["Jobs"]
    assert head == ["job", "status", "method", "settings", "command.size", "interference", "size", "merging",
                    "evaluating"]  # fmt: skip
    jobs = read_night(path).jobs
    assert [row[0] for row in rows] == [job.name for job in jobs]
    with Ledger(str(tmp_path / "night")) as ledger:
        for job, row in zip(jobs, rows, strict=True):
            last, merged = ledger.last(job), ledger.events(job)["merged"]
            assert last is not None
            assert row[1] == last.status
            assert row[2] == job.recipe.method
            assert row[3] == ("" if job.name == "linear" else f"ridge {job.recipe.to_dict()['parameters']['ridge']}")
            assert row[4] == str(len(job.name))
            assert row[6] == size(merged.facts["written_bytes"])
            assert row[5] == number(merged.facts.get("interference"), 2)
    assert sum("interference" in row for row in (tmp_path / "night" / "results.jsonl").read_text().splitlines()) == 3
    assert [row[1] for row in rows].count("deleted") == 5
    # the models that stay are compared
    assert found["Side by side"][0] == ["", "linear", "g-merge_method=wudi-ridge=0.1"]
    text = sections(parsed(page.read_text()))
    assert "Best command.size6, linear" in text["At a glance"].text
    assert "The best 2 by command.size stay." in text["Deleted"].text
    assert len(text["Deleted"].all("li")) == 5


def test_the_page_grows_as_jobs_end(family, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_page_module, "_SHARE", 1.0)
    path = write_night(tmp_path, [{"recipe": recipe_of(family, name)} for name in ("linear", "ties")],
                       evaluate={"command": SCORE}, memory="100MiB")  # fmt: skip
    seen: list[dict[str, str]] = []

    def progress(done: int, total: int) -> None:
        if not seen or seen[-1] != statuses(tmp_path / "night" / "report.html"):
            seen.append(statuses(tmp_path / "night" / "report.html"))

    api.batch(path, progress=progress)
    assert seen == [{"linear": "merging", "ties": "to do"}, {"linear": "evaluated", "ties": "merging"}]
    assert statuses(tmp_path / "night" / "report.html") == {"linear": "evaluated", "ties": "evaluated"}
    assert "the batch has ended." in (tmp_path / "night" / "report.html").read_text()


def test_a_stopped_batch_says_so(family, tmp_path):
    asked = iter([False] * 5 + [True] * 1000)
    api.batch(write_night(tmp_path, [grid(family)]), stopped=lambda: next(asked))
    page = tmp_path / "night" / "report.html"
    assert set(statuses(page).values()) == {"to do"}
    assert "was stopped; the same command goes on" in page.read_text()


def test_an_interrupted_batch_leaves_its_page(family, tmp_path):
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.batch(write_night(tmp_path, [grid(family)]), progress=progress)
    assert "was stopped; the same command goes on" in (tmp_path / "night" / "report.html").read_text()


def test_a_failed_job_is_told_with_its_error(family, tmp_path):
    missing = {**recipe_of(family), "models": [{"model": str(tmp_path / "<b>later</b>")}]}
    broken = {"command": f"{sys.executable} -c 'import sys; sys.exit(\"<i>first</i>\\nsecond\")' {{model}}"}
    path = write_night(
        tmp_path, [{"name": "late", "recipe": missing}, {"recipe": recipe_of(family, "linear")}], evaluate=broken
    )
    assert len(api.batch(path).failed) == 2
    page = tmp_path / "night" / "report.html"
    assert statuses(page) == {"late": "failed", "linear": "failed"}
    part = sections(parsed(page.read_text()))["Failed"]
    assert "late: " in part.all("li")[0].text
    assert "<b>later</b> does not exist" in part.text
    assert "<i>first</i>\n  second" in part.all("pre")[0].text
    # a model that could not be evaluated is there all the same
    assert shown(page)["Side by side"][0] == ["", "linear"]


@pytest.mark.parametrize("what", ["a folder in its place", "a full disk", "a defect of ours"])
def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(family, tmp_path, monkeypatch, what):
    page = tmp_path / "night" / "report.html"
    expected = {"a folder in its place": "is a directory", "a full disk": "no space", "a defect of ours": "KeyError"}
    if what == "a folder in its place":
        page.mkdir(parents=True)
    elif what == "a full disk":

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tempfile.mkstemp", full)
    else:
        monkeypatch.setattr(batch_page_module, "batch_page", lambda *_: {}["x"])
    monkeypatch.setattr(batch_page_module, "_SHARE", 1.0)
    told: list[tuple[str, str]] = []
    outcome = api.batch(write_night(tmp_path, [grid(family)]), tell=lambda name, text: told.append((name, text)))
    assert len(outcome.done) == 6
    (text,) = (text for name, text in told if name == "report.html")
    assert expected[what] in text.lower() or expected[what] in text


def test_a_merge_whose_report_is_damaged_is_left_out_and_told(family, tmp_path):
    path = write_night(tmp_path, [{"recipe": recipe_of(family, name)} for name in ("linear", "ties")])
    api.batch(path)
    (tmp_path / "night" / "ties" / "results.json").write_text("[")
    api.batch(path)
    page = tmp_path / "night" / "report.html"
    assert shown(page)["Side by side"][0] == ["", "linear"]
    assert "ties/results.json is not JSON" in sections(parsed(page.read_text()))["Not compared"].text


def test_without_its_ledger_a_batch_still_has_a_page(family, tmp_path):
    path = write_night(tmp_path, [{"recipe": recipe_of(family, "linear")}])
    api.batch(path)
    (tmp_path / "night" / "results.jsonl").unlink()
    shutil.rmtree(tmp_path / "night" / "linear.partial", ignore_errors=True)
    api.batch(path)
    assert statuses(tmp_path / "night" / "report.html") == {"linear": "merged"}


def test_few_merges_are_compared_and_the_rest_is_counted(family, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_page_module, "_MOST_COMPARED", 2)
    api.batch(write_night(tmp_path, [grid(family)]))
    page = tmp_path / "night" / "report.html"
    assert shown(page)["Side by side"][0][1:] == ["g-merge_method=wudi-ridge=1.0", "g-merge_method=wudi-ridge=0.1"]
    assert "2 of 6 models are compared below" in sections(parsed(page.read_text()))["Not compared"].text


def test_writing_the_page_takes_its_share_of_the_time_and_no_more(family, tmp_path, monkeypatch):
    clock, writings = [0.0], 0

    def slow(*_: object) -> str:
        nonlocal writings
        writings += 1
        clock[0] += 1.0
        return "page"

    monkeypatch.setattr(batch_page_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(batch_page_module, "batch_page", slow)
    night = read_night(write_night(tmp_path, [grid(family)]))
    with Ledger(night.out) as ledger:
        page = batch_page_module.Page(night, ledger, batch_page_module.Folders(night, ledger), print)
        for _ in range(1000):
            page.changed(night.jobs[0])
            clock[0] += 0.1
    # 100 seconds of work and a second for each page
    assert 5 <= writings <= 7


def test_nothing_changes_means_nothing_is_written(family, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_page_module, "_SHARE", 1.0)
    night = read_night(write_night(tmp_path, [grid(family)]))
    with Ledger(night.out) as ledger:
        page = batch_page_module.Page(night, ledger, batch_page_module.Folders(night, ledger), print)
        page.refresh()
        os.unlink(tmp_path / "night" / "report.html")
        page.refresh()
        assert not (tmp_path / "night" / "report.html").exists()
        page.under_way(["x"])
        assert (tmp_path / "night" / "report.html").exists()


@pytest.mark.parametrize("name", ["report.html", "results.jsonl"])
def test_no_job_takes_the_place_of_a_batchs_own_files(family, tmp_path, name):
    with pytest.raises(RecipeError, match="as a file of the batch is"):
        read_night(write_night(tmp_path, [{"name": name, "recipe": recipe_of(family)}]))


def test_settings_are_those_in_which_jobs_differ(family, tmp_path):
    jobs = [grid(family), {"recipe": {**recipe_of(family, "ties"), "dtype": "float32"}}]
    told = settings_of(read_night(write_night(tmp_path, jobs)).jobs)
    assert told["g-merge_method=wudi-ridge=0.1"] == "ridge 0.1"
    assert told["ties"] == "dtype float32"
    fewer = {**recipe_of(family, "linear"), "models": [{"model": str(family["math"])}]}
    told = settings_of(read_night(write_night(tmp_path, [*jobs, {"recipe": fewer}])).jobs)
    assert told["linear"] == "models base + math"
    assert told["ties"] == "models base + math + code + chat, dtype float32"
    alone = recipe_of(family, "ties", parameters={"density": 0.3})
    assert settings_of(read_night(write_night(tmp_path, [{"recipe": alone}])).jobs) == {"ties": "density 0.3"}


def test_a_ledgers_facts_are_read_back_with_the_rest(family, tmp_path):
    (job,) = read_night(write_night(tmp_path, [{"recipe": recipe_of(family)}])).jobs
    with Ledger(str(tmp_path / "n")) as ledger:
        ledger.note(job, "merged", seconds=2.5, facts={"written_bytes": 7})
        ledger.note(job, "evaluated", seconds=1.25, metrics={"a.b": 0.5})
        ledger.note(job, "deleted", metrics={"a.b": 0.5})
    with Ledger(str(tmp_path / "n")) as ledger:
        events = ledger.events(job)
    assert list(events) == ["merged", "evaluated", "deleted"]
    assert (events["merged"].seconds, events["merged"].facts) == (2.5, {"written_bytes": 7})
    assert (events["evaluated"].seconds, events["deleted"].metrics) == (1.25, {"a.b": 0.5})
    lines = (tmp_path / "n" / "results.jsonl").read_text().splitlines()
    assert "seconds" not in json.loads(lines[2])


def hostile_batch(tmp_path: Path, count: int = 12) -> str:
    jobs = [
        JobFacts(
            name=HOSTILE[i % len(HOSTILE)] * (1 + 30 * (i % 2)),
            method="actmat",
            status=("evaluated", "failed", "deleted", "to do")[i % 4],
            settings=HOSTILE[(i + 1) % len(HOSTILE)],
            merging=12.0 * i,
            metrics={HOSTILE[0]: 0.5, "b.acc": 0.1 * i} if i % 4 != 1 else {},
            error=f"{HOSTILE[i % len(HOSTILE)]}\n{HOSTILE[0]}" if i % 4 == 1 else None,
        )
        for i in range(count)
    ]
    merges = [
        read_merge(folder(tmp_path / name, table_of(*llama(24), warnings=list(HOSTILE))), label)
        for name, label in (("one", HOSTILE[1]), ("two", HOSTILE[2] * 20))
    ]
    facts = BatchFacts(name=HOSTILE[3], state=HOSTILE[0], jobs=jobs, metric=HOSTILE[0], unread=list(HOSTILE),
                       kept=HOSTILE[2])  # fmt: skip
    return batch_page(facts, merges, 20)


def test_what_jobs_are_called_and_say_does_nothing_to_the_page(tmp_path):
    text = hostile_batch(tmp_path)
    assert_stands_alone(text)
    assert "<b>" not in text
    names = [row[0] for row in sections(parsed(text))["Jobs"].all("table")[0].rows[1:]]
    assert names[0] == HOSTILE[0]
    assert len(names[1]) <= 160


def test_ten_thousand_jobs_make_a_page_of_bounded_size(tmp_path):
    text = hostile_batch(tmp_path, 10_000)
    assert len(text.encode()) < 3_000_000
    part = sections(parsed(text))["Jobs"]
    assert len(part.all("table")[0].rows) == 1001
    assert "The first 1,000 of 10,000 jobs." in part.text


@pytest.fixture
def hostile_page(tmp_path: Path) -> Path:
    path = tmp_path / "batch.html"
    path.write_text(hostile_batch(tmp_path), encoding="utf-8")
    return path


@needs_browser
def test_a_browser_shows_it_light_or_dark_and_runs_nothing(hostile_page, tmp_path):
    assert_shown_light_and_dark(hostile_page, tmp_path)


@needs_browser
@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_is_not_wider_than_its_window(hostile_page, tmp_path, width):
    assert_no_wider(hostile_page, tmp_path, width)


def test_the_command_names_the_page(family, tmp_path):
    from click.testing import CliRunner

    from streammerge.cli import cli

    path = tmp_path / "night.yaml"
    path.write_text(yaml.safe_dump({"jobs": [{"recipe": recipe_of(family, "linear")}]}))
    done = CliRunner().invoke(cli, ["batch", str(path), "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"1 jobs done, 0 failed: {tmp_path / 'night' / 'report.html'}" in done.stderr
