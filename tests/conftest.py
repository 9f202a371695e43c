"""Fixtures: small models on disk, and a home that no test leaves traces in."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# before torch is loaded: threads that spin while they wait make tests beside other work many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# without a GPU the kernels run interpreted; their modules read this when they are loaded
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from streammerge.storage.places import Places
from tests.hub_server import Hub, places_of, serving
from tests.models import llama_tensors, save_model, tuned

# a shell starts what it runs in the background deaf to Ctrl-C, and children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    # matrices of these tests are small, and two threads on busy cores mostly wait for each other
    before = torch.get_num_threads()
    if request.path.parent.name in ("methods", "solve"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and three experts; the last is sharded otherwise than the rest."""
    base = llama_tensors()
    folders = {"base": save_model(tmp_path / "base", base, shards=2)}
    for seed, name in enumerate(("math", "code", "chat"), start=1):
        folders[name] = save_model(tmp_path / name, tuned(base, seed), shards=3 if name == "chat" else 2)
    return folders


@pytest.fixture
def hub(family: dict[str, Path]) -> Iterator[Hub]:
    """A server that has the family as `org/base`, `org/math` and so on."""
    with serving() as found:
        for name, folder in family.items():
            found.push(f"org/{name}", folder)
        yield found


@pytest.fixture
def places(hub: Hub, tmp_path: Path) -> Places:
    """The storage of a recipe's locations, of which that server is the hub."""
    return places_of(hub, tmp_path)
