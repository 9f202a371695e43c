"""Merges of models on the hub: the bytes of local copies, whatever is interrupted, moved or deleted meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

import streammerge
from streammerge import fetching, write
from streammerge.errors import OutputError, PlanError, StreamMergeError
from streammerge.fetching import Fetches
from streammerge.recipe import Recipe
from streammerge.storage.hub import HubStorage
from streammerge.storage.places import Places
from tests.hub_server import Hub, places_of
from tests.models import llama_tensors, recipe_of, save_model, tuned

ROOT = Path(__file__).parent.parent
WEIGHTS = "models--*/snapshots/*/*.safetensors"


def remote(method: str = "actmat", **more: object) -> dict[str, object]:
    return {
        "merge_method": method,
        "base_model": "org/base",
        "models": [{"model": f"org/{name}"} for name in ("math", "code", "chat")],
        **more,
    }


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


def cached(tmp_path: Path) -> set[str]:
    return {f"{p.parts[-4].removeprefix('models--org--')}/{p.name}" for p in (tmp_path / "hub-cache").glob(WEIGHTS)}


@pytest.mark.parametrize("method", ["actmat", "ties", "linear"])
def test_a_merge_of_models_on_the_hub_is_that_of_local_copies(family, hub, places, tmp_path, method):
    more: dict[str, Any] = {"max_shard_size": 6000}
    settings = {"parameters": {"density": 0.5, "trim": "model"}} if method == "ties" else {}
    streammerge.merge(recipe_of(family, method, **settings), tmp_path / "local", **more)
    report = streammerge.merge(remote(method, **settings), tmp_path / "out", storage=places, **more)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    base = hub.revisions["org/base"]["main"]
    assert report.inputs[0]["location"] == report.recipe["base_model"] == f"org/base@{base}"
    assert '- "org/base"\n' in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_reads_headers_and_small_files_alone(hub, tmp_path):
    tensors = {name: t.repeat(*([200] + [1] * (t.dim() - 1))) for name, t in llama_tensors().items()}
    hub.push("org/large", save_model(tmp_path / "large", tensors, shards=3))
    hub.push("org/tuned", save_model(tmp_path / "tuned", tuned(tensors, 1), shards=3))
    before = hub.sent_bytes
    places = places_of(hub, tmp_path)
    recipe = {"merge_method": "linear", "models": [{"model": "org/large"}, {"model": "org/tuned@main"}]}
    planned = streammerge.plan(recipe, storage=places)
    assert planned.read_bytes > 5_000_000
    assert hub.sent_bytes - before < 500_000
    assert Fetches(planned, places).nbytes > planned.read_bytes
    assert not cached(tmp_path)


def test_later_files_are_fetched_while_earlier_tensors_merge(family, hub, places, tmp_path):
    held = threading.Event()
    hub.gates["model-00002-of-00002.safetensors"] = held
    events: list[str] = []

    def progress(done: int, total: int) -> None:
        if done and not held.is_set():
            events.append("merged while a later file was on its way")
            assert any(seen.path.endswith("00002-of-00002.safetensors") for seen in hub.seen)
            held.set()

    streammerge.merge(remote("linear"), tmp_path / "out", storage=places, progress=progress)
    assert events
    streammerge.merge(recipe_of(family, "linear"), tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


@pytest.mark.parametrize("method", ["task_arithmetic", "actmat", "ties"])
def test_consumed_files_are_deleted_and_the_disk_never_holds_all(family, hub, tmp_path, method, monkeypatch):
    monkeypatch.setattr(write, "GROUP_BYTES", 1)
    settings = {"parameters": {"trim": "model", "density": 0.5}} if method == "ties" else {}
    streammerge.merge(recipe_of(family, method, **settings), tmp_path / "local")
    # one file was there before: it stays
    before = places_of(hub, tmp_path)
    storage = before._storages["hub"]
    storage.open("org/math", "model-00001-of-00002.safetensors").fetch(0, 8, memoryview(bytearray(8)))
    places = places_of(hub, tmp_path)
    most = 0

    def progress(done: int, total: int) -> None:
        nonlocal most
        most = max(most, len(cached(tmp_path)))

    streammerge.merge(
        remote(method, **settings), tmp_path / "out", storage=places, delete_consumed=True, progress=progress
    )
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    assert cached(tmp_path) == {"math/model-00001-of-00002.safetensors"}
    kept = [p for p in (tmp_path / "hub-cache").glob("models--*/blobs/*") if p.stat().st_size > 5000]
    assert len(kept) == 1
    assert 0 < most <= 9
    # without the option they stay
    streammerge.merge(remote(method, **settings), tmp_path / "again", storage=places_of(hub, tmp_path))
    assert len(cached(tmp_path)) == 9


def test_a_users_own_folder_keeps_its_files(family, hub, places, tmp_path):
    recipe = {**remote("linear"), "base_model": str(family["base"])}
    before = weights_of(family["base"])
    streammerge.merge(recipe, tmp_path / "out", storage=places, delete_consumed=True)
    assert weights_of(family["base"]) == before
    assert not cached(tmp_path)


def test_the_disk_that_deleting_saves_is_counted(hub, tmp_path, monkeypatch):
    folders = {
        name: save_model(tmp_path / name, tuned(llama_tensors(), seed), shards=10) for seed, name in enumerate("ab")
    }
    for name, folder in folders.items():
        hub.push(f"org/{name}", folder)
    places = places_of(hub, tmp_path)
    planned = streammerge.plan(
        {"merge_method": "linear", "models": [{"model": "org/a"}, {"model": "org/b"}]}, storage=places
    )
    whole, least = Fetches(planned, places), Fetches(planned, places, delete=True)
    # what is not durable yet keeps its inputs
    assert whole.most_bytes == whole.nbytes == least.nbytes == least.most_bytes
    monkeypatch.setattr(fetching, "_LATE_BYTES", 0)
    assert 0 < Fetches(planned, places, delete=True).most_bytes < whole.nbytes * 3 / 4


def test_a_disk_too_small_for_what_is_fetched_is_told_before_anything_is_written(hub, places, tmp_path, monkeypatch):
    planned = streammerge.plan(remote("linear"), storage=places)
    fetched, written = Fetches(planned, places).nbytes, planned.layout.total_bytes
    usage = type("Usage", (), {"free": fetched + written - 1})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(PlanError, match=r"fetching the models takes .* of output, but .* are free") as raised:
        streammerge.merge(remote("linear"), tmp_path / "out", storage=places)
    assert "HF_HUB_CACHE" in raised.value.hint
    assert "--delete-consumed" in raised.value.hint
    assert not list(tmp_path.glob("out*"))
    usage.free += 1
    streammerge.merge(remote("linear"), tmp_path / "out", storage=places)


KILLED = """
import sys, json
from streammerge import memory, write
import streammerge
memory.LARGEST_SLOT_BYTES = 256
write.GROUP_BYTES = 1
streammerge.merge(json.loads(sys.argv[1]), sys.argv[2], delete_consumed=True)
"""


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_VERBOSITY": "error",
    }


def wait_for(is_so: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert process.poll() is None, "the merge ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_merge_resumes_and_fetches_only_what_is_still_needed(family, hub, tmp_path):
    streammerge.merge(recipe_of(family, "task_arithmetic"), tmp_path / "local")
    hub.gates["model-00002-of-00002.safetensors"] = hub.gates["model-00003-of-00003.safetensors"] = threading.Event()
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(remote("task_arithmetic")), str(out)], env=environment(hub, tmp_path)
    )
    index = json.loads((family["base"] / "model.safetensors.index.json").read_text())
    count = sum(file.startswith("model-00001") for file in index["weight_map"].values())
    try:
        # all that the first files hold is merged, and the next ones are on their way
        wait_for(lambda: journal.exists() and journal.read_text().count("\n") == 1 + count, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    hub.gates["model-00002-of-00002.safetensors"].set()
    hub.seen.clear()
    report = streammerge.merge(
        remote("task_arithmetic"), out, storage=places_of(hub, tmp_path), resume=True, delete_consumed=True
    )
    assert report.resumed_tensors == count
    assert weights_of(out) == weights_of(tmp_path / "local")
    whole = [seen.path.rpartition("/")[2] for seen in hub.got(".safetensors") if seen.range is None]
    assert "model-00002-of-00002.safetensors" in whole
    assert "model-00001-of-00002.safetensors" not in whole
    # what was there before a merge is not its to delete, even if an earlier run of it fetched it
    assert cached(tmp_path) == {f"{name}/model-00001-of-0000{2 + (name == 'chat')}.safetensors" for name in family} | {
        "chat/model-00002-of-00003.safetensors"
    }


def test_files_of_finished_tensors_are_not_fetched_again(family, hub, places, tmp_path):
    planned = streammerge.plan(remote("actmat"), storage=places)
    first = {name for name, entry in planned.models[0].tensors.items() if entry.file.startswith("model-00001")}
    fetches = Fetches(planned, places, skip=first)
    assert {name for location, name in fetches._order if "base@" in location} == {"model-00002-of-00002.safetensors"}
    # of a pool that is half done, all is read again
    pooled = streammerge.plan(remote("actmat", parameters={"pool": "inputs"}), storage=places)
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert any(step.pool for step in pooled.steps if step.name == gate)
    rest = {step.name for step in pooled.steps} - {"model.layers.0.mlp.up_proj.weight"}
    held = {pooled.models[0].tensors[name].file for name in (gate, "model.layers.0.mlp.up_proj.weight")}
    again = Fetches(pooled, places, skip=rest)
    assert {name for location, name in again._order if "base@" in location} == held
    # and a look at the whole model sees what is finished, too
    looked = streammerge.plan(remote("ties", parameters={"trim": "model", "density": 0.5}), storage=places)
    assert len(Fetches(looked, places, skip=first)._order) == 9


def interrupted(recipe: dict[str, object], out: Path, places: Places, after: int = 5) -> None:
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(recipe, out, storage=places, progress=progress)


def test_a_revision_that_moved_is_refused_and_its_commit_by_name_resumes(family, hub, places, tmp_path):
    streammerge.merge(recipe_of(family, "linear"), tmp_path / "local")
    out = tmp_path / "out"
    interrupted(remote("linear"), out, places)
    before = hub.revisions["org/math"]["main"]
    now = hub.push("org/math", save_model(tmp_path / "newer", tuned(llama_tensors(), 9), shards=2))
    later = places_of(hub, tmp_path)
    with pytest.raises(OutputError, match="was begun with other inputs") as raised:
        streammerge.merge(remote("linear"), out, storage=later, resume=True)
    assert f"org/math@{before}" in raised.value.message
    assert f"org/math@{now}" in raised.value.message
    recipe = {
        **remote("linear"),
        "models": [{"model": f"org/math@{before}"}, {"model": "org/code"}, {"model": "org/chat"}],
    }
    report = streammerge.merge(recipe, out, storage=places_of(hub, tmp_path), resume=True)
    assert report.resumed_tensors > 0
    assert weights_of(out) == weights_of(tmp_path / "local")


def test_a_report_names_the_commits_so_that_its_merge_is_done_again_and_verified(hub, places, tmp_path):
    out = tmp_path / "out"
    streammerge.merge(remote("linear", tokenizer_source="org/math"), out, storage=places)
    hub.push("org/math", save_model(tmp_path / "newer", tuned(llama_tensors(), 9), shards=2))
    later = places_of(hub, tmp_path)
    assert not streammerge.verify(out, recompute=3, storage=later).problems
    streammerge.merge(out / "streammerge.json", tmp_path / "again", storage=later)
    assert weights_of(tmp_path / "again") == weights_of(out)


def test_offline_a_merge_reads_the_cache(hub, places, tmp_path, monkeypatch):
    streammerge.merge(remote("task_arithmetic"), tmp_path / "out", storage=places)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    streammerge.merge(remote("task_arithmetic"), tmp_path / "again", storage=places_of(hub, tmp_path))
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "out")
    assert not hub.seen


def test_a_local_folder_of_that_name_wins(family, hub, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    for name, folder in family.items():
        (tmp_path / "org" / name).symlink_to(folder)
    hub.seen.clear()
    planned = streammerge.plan(remote("linear"), storage=places)
    assert planned.models[0].location == "org/base"
    assert not hub.seen


def test_names_in_messages_hold_as_much_of_a_commit_as_people_write():
    commits = "a" * 40, "b" * 40
    recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": f"org/m@{c}"} for c in commits]})
    assert recipe.names == ("m@aaaaaaa", "m@bbbbbbb")


def run(hub: Hub, tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streammerge", *arguments],
        env={**environment(hub, tmp_path), **more},
        capture_output=True,
        text=True,
        timeout=90,
        cwd=tmp_path,
    )


def test_the_command_line_plans_merges_and_says_what_is_missing(hub, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(remote("linear")))
    planned = run(hub, tmp_path, "plan", "recipe.yaml")
    assert "\n  fetch     " in planned.stdout, planned.stderr
    assert json.loads(run(hub, tmp_path, "plan", "recipe.yaml", "--json").stdout)["fetch_bytes"] > 50_000
    done = run(hub, tmp_path, "merge", "recipe.yaml", "out", "--delete-consumed", HF_TOKEN="hf_secretsecret")
    assert done.returncode == 0, done.stderr
    assert not cached(tmp_path)
    assert "hf_secretsecret" not in done.stderr + "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))
    missing = run(hub, tmp_path, "inspect", "org/base", "org/nothing")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: `org/nothing` is neither a folder here nor a model")
    assert "hint:" in missing.stderr
    offline = run(hub, tmp_path, "inspect", "org/never", HF_HUB_OFFLINE="1")
    assert "`HF_HUB_OFFLINE` is set" in offline.stderr
    assert offline.returncode == 1


def test_ctrl_c_ends_a_merge_that_waits_for_the_network(hub, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(remote("linear")))
    hub.gates["model-00002-of-00002.safetensors"] = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-m", "streammerge", "merge", "recipe.yaml", "out", "--quiet"],
        env=environment(hub, tmp_path),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(
            lambda: (tmp_path / "out.partial").is_dir() and len(hub.got("00002-of-00002.safetensors")) > 6, process
        )
        time.sleep(1)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in told
    assert time.monotonic() - started < 15


def test_local_folders_are_planned_without_the_hubs_library(family, tmp_path):
    code = (
        "import sys, json, streammerge; streammerge.plan(json.loads(sys.argv[1]), memory='1GiB'); "
        "print([m for m in ('huggingface_hub', 'torch', 'obstore') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(recipe_of(family, "linear"))],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_capture_of_a_model_on_the_hub_is_that_of_a_local_copy(hub, tmp_path):
    pytest.importorskip("transformers")
    from tests.test_capture import llama, save

    folder = save(llama(), tmp_path / "local")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "w1 w2 w3"}))
    (folder / "pytorch_model.bin").write_bytes(b"another kind of weights")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    hub.push("org/run", folder)
    storage = HubStorage(endpoint=hub.url, cache=str(tmp_path / "hub-cache"))
    found = {
        name: streammerge.capture(model, tmp_path / "data.jsonl", tmp_path / name, storage=storage)
        for name, model in {"there": "org/run@main", "again": "org/run"}.items()
    }
    streammerge.capture(folder, tmp_path / "data.jsonl", tmp_path / "here")
    assert found["there"].matrices > 0
    assert weights_of(tmp_path / "there") == weights_of(tmp_path / "again") == weights_of(tmp_path / "here")
    assert not hub.got("pytorch_model.bin")
    assert not hub.got("modeling_own.py")
    assert len([seen for seen in hub.got("model.safetensors") if seen.method == "GET" and not seen.range]) <= 1


def test_a_capture_of_a_model_that_is_not_on_the_hub_says_so(hub, tmp_path):
    storage = HubStorage(endpoint=hub.url, cache=str(tmp_path / "hub-cache"))
    with pytest.raises(StreamMergeError, match="`org/nothing`") as raised:
        streammerge.capture("org/nothing", tmp_path / "data.jsonl", tmp_path / "out", storage=storage)
    assert raised.value.hint
    assert not (tmp_path / "out").exists()
