from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import streammerge
from streammerge import devices
from tests.models import recipe_of

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("name", "whole"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:012", "cuda:12")]
)
def test_devices_have_torch_s_names(name, whole):
    assert devices.canonical(name) == whole


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:-1", "CUDA", "cuda:0; ls", "gpu", "cpu:0", "cuda:1000"])
def test_other_names_are_refused_with_those_that_there_are(name):
    with pytest.raises(streammerge.StreamMergeError, match="is not a device to merge on: expected `cpu`, `cuda`"):
        devices.canonical(name)


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(family, tmp_path, name):
    for more in ({}, {"device_memory": "8GiB"}):
        with pytest.raises(
            streammerge.StreamMergeError, match=r"`cuda:\d` is not there: torch .* sees 0 CUDA dev"
        ) as e:
            streammerge.merge(recipe_of(family, "actmat"), tmp_path / "out", device=name, **more)
        assert e.value.hint.startswith("Use `--device cpu`")
    assert not any(tmp_path.glob("out*"))


def test_device_memory_without_a_device_is_refused(family):
    with pytest.raises(streammerge.StreamMergeError, match="`device_memory` is set for `cpu`"):
        streammerge.plan(recipe_of(family, "actmat"), device_memory="1GiB")


def test_a_plan_for_another_machine_s_device_needs_neither_the_device_nor_torch(family, tmp_path):
    script = (
        "import sys, streammerge; "
        f"plan = streammerge.plan({recipe_of(family, 'actmat')!r}, device='cuda', device_memory='8GiB'); "
        "print(plan.device, plan.device_memory.budget_bytes, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["cuda:0", str(8 << 30), "False"]


def test_what_the_environment_sets_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    devices.prepare_torch()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
