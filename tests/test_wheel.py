"""The wheel: builds, holds every module, works where only its dependencies are installed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # a copy: building must not leave anything in the checkout
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        capture_output=True,
        check=True,
    )
    return next(folder.glob("*.whl"))


def test_every_module_is_in_the_wheel_and_nothing_else_is(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(p.relative_to(ROOT)) for p in ROOT.glob("streammerge/**/*.py")}
    sources |= {str(p.relative_to(ROOT / "kernels")) for p in ROOT.glob("kernels/streammerge_kernels/*.py")}
    assert held == sources | {"streammerge/py.typed", "streammerge_kernels/py.typed"}


def test_the_wheel_works_in_a_clean_environment(wheel, tmp_path, family):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    # the dependencies, but not the checkout: a path line does not run the .pth files of the folder it names
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run = [str(python), "-P", "-m", "streammerge"]
    done = subprocess.run(
        [*run, "merge", "--base", str(family["base"]), "--expert", str(family["math"]), "--expert", str(family["code"]),
         str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where = "import streammerge, streammerge_kernels; print(streammerge.__file__)"
    shown = subprocess.run([str(python), "-c", where], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert str(site) in shown.stdout
    kernels = subprocess.run([str(python), "-c", "import kernels"], capture_output=True, cwd=tmp_path, check=False)
    assert kernels.returncode != 0
