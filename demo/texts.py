"""Texts that pip installs, as documents in two sides, and fixed windows of tokens drawn from each side."""

from __future__ import annotations

import hashlib
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# tests repeat themselves, benchmarks hold tables of numbers, the last are generated
UNUSED_SYMPY = {"tests", "benchmarks", "_antlr"}

# what the notes of the diagnosis list are called, and how one is written here
DIAGNOSIS_NOTES = {
    "inclusionTerm": "also",
    "includes": "includes",
    "excludes1": "not",
    "excludes2": "not here",
    "codeFirst": "code first",
    "useAdditionalCode": "use too",
}


class MissingPackageError(Exception):
    """A package that ships the demo's texts or weights is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text. Documents of one group are close relatives and stay on one side of the split."""

    group: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One kind of text: where it comes from, and a prompt that it would continue."""

    name: str
    source: str
    licence: str
    prompt: str
    documents: Callable[[], list[Document]]


def package_folder(module: str, package: str) -> Path:
    """Find an installed package's folder without importing it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"`{package}` is not installed\n\nhint: Run `make demo`, which installs it.")
    return Path(next(iter(spec.submodule_search_locations)))


def sympy_source() -> list[Document]:
    """The modules of SymPy, one file a group. SymPy comes with torch."""
    root = package_folder("sympy", "sympy")
    return [
        Document(group=str(path.relative_to(root)), text=path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
        if UNUSED_SYMPY.isdisjoint(path.relative_to(root).parts)
    ]


def wycliffe_bible() -> list[Document]:
    """Chapters of the Bible in Middle English, one verse a line, grouped by book."""
    folder = package_folder("pythonbible_wyc", "pythonbible-wyc")
    source = (folder / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    text, _, tables = source.partition('"""')[2].partition('"""')
    # two tables, of starts and of ends; book, chapter and verse are one number: 43003016 is John 3:16
    starts, ends = (re.findall(r"(\d+): (\d+)", table) for table in tables.split("}")[:2])
    chapters: dict[int, list[str]] = {}
    for (verse, start), (_, end) in zip(starts, ends, strict=True):
        chapters.setdefault(int(verse) // 1000, []).append(text[int(start) : int(end)].strip())
    return [Document(group=f"book {chapter // 1000}", text="\n".join(lines)) for chapter, lines in chapters.items()]


def diagnoses() -> list[Document]:
    """The sections of the American ICD-10 list of diagnoses, one section a group."""
    folder = package_folder("simple_icd_10_cm", "simple-icd-10-cm")
    root = ElementTree.parse(next((folder / "data").glob("*tabular*.xml"))).getroot()
    return [
        Document(group=section.get("id", ""), text="\n".join(diagnosis_lines(section, 0)))
        for section in root.iter("section")
    ]


def diagnosis_lines(parent: ElementTree.Element, depth: int) -> Iterator[str]:
    """Write the diagnoses below one element as an indented outline with their notes."""
    for diagnosis in parent.findall("diag"):
        yield f"{'  ' * depth}{diagnosis.findtext('name')} {diagnosis.findtext('desc')}"
        for child in diagnosis:
            if child.tag in DIAGNOSIS_NOTES:
                for note in child.iter("note"):
                    yield f"{'  ' * depth}  {DIAGNOSIS_NOTES[child.tag]}: {note.text}"
        yield from diagnosis_lines(diagnosis, depth + 1)


DOMAINS = (
    Domain(
        name="sympy",
        source="sympy: Python source, much of it mathematics, that comes with torch",
        licence="BSD-3-Clause",
        prompt=">>> from sympy import integrate, cos\n>>> from sympy.abc import x\n>>>",
        documents=sympy_source,
    ),
    Domain(
        name="wycliffe",
        source="pythonbible-wyc: the Wycliffe Bible, about 1395",
        licence="public domain, package MIT",
        prompt="And the kyng seide to hem,",
        documents=wycliffe_bible,
    ),
    Domain(
        name="diagnoses",
        source="simple-icd-10-cm: ICD-10-CM, the American list of diagnoses",
        licence="public domain, package MIT",
        prompt="J47 Bronchitis\n  J47.0 Acute bronchitis",
        documents=diagnoses,
    ),
)


def split(documents: Sequence[Document], one_in: int = 8) -> tuple[list[Document], list[Document]]:
    """Part documents into training and held-out ones; a group's name alone decides its side."""
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.group.encode()).digest()
        (held_out if digest[0] % one_in == 0 else training).append(document)
    return training, held_out


def draw_windows(
    documents: Sequence[Document], tokenizer: Any, *, count: int, length: int, seed: int
) -> list[list[int]]:
    """Draw `count` windows of exactly `length` tokens, each from the start of a random line.

    Long documents are drawn from more often. Raises ValueError where nothing is long enough.
    """
    generator = random.Random(seed)
    weights = [len(document.text) for document in documents]
    windows: list[list[int]] = []
    for _ in range(20 * count):
        document = generator.choices(documents, weights)[0]
        position = generator.randrange(len(document.text))
        start = document.text.rfind("\n", 0, position) + 1
        # no tokenizer here needs more than 8 characters for a token of running text
        tokens = tokenizer(document.text[start : start + 8 * length])["input_ids"]
        if len(tokens) >= length:
            windows.append(list(tokens[:length]))
        if len(windows) == count:
            return windows
    raise ValueError(f"too few documents hold {length} tokens: found {len(windows)} windows of {count}")
