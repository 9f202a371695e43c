"""HTML pages read back: their text by section, their tables and pictures, and what in them could reach outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from streammerge.reporting import style

VOID = {"meta"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

HOSTILE = (
    "<script>document.title='taken'</script>",
    '"><img src=x onerror="document.title=\'taken\'">',
    "'><svg/onload=document.title='taken'>",
    "</style></title><script>document.title='taken'</script>",
    "javascript:alert(1)",
    "&lt;b&gt; &amp;amp; ]]> -->",
    "\u202emoc.live\u202c \x00\x1b[2J\u2028\ufeff",
    "{{7*7}} ${7*7} `code` ``",
    "half a character: \ud800",
)


@dataclass
class Element:
    """An element of a page; `children` are elements and text, in order."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """Every element of a tag within, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if child.tag == tag else []
                found += child.all(tag)
        return found

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def rows(self) -> list[list[str]]:
        """A table's rows, each cell's text."""
        return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in self.all("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("document")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"{tag} closes {self.open[-1].tag}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(text: str) -> Element:
    """A page, whose every element must be closed in its place."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, [element.tag for element in reader.open]
    return reader.open[0]


def sections(page: Element) -> dict[str, Element]:
    """A page's sections by their headings."""
    return {section.all("h2")[0].text: section for section in page.all("section")}


def assert_stands_alone(text: str) -> None:
    """Nothing in the page runs, or comes from anywhere else."""
    page = parsed(text)
    for tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "image", "use"):
        assert not page.all(tag), tag

    def check(element: Element) -> None:
        for name in element.attributes:
            assert not name.startswith("on"), name
            assert name not in ("src", "href", "srcset", "action", "style", "xlink:href", "srcdoc"), name
        for child in element.children:
            if isinstance(child, Element):
                check(child)

    check(page)
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    policy = next(m for m in page.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'unsafe-inline';")


def browse(*arguments: str, timeout: float = 60) -> str:
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout


def corner(png: bytes) -> str:
    """The first pixel of a picture: its filter has nothing beside it or above it to refer to."""
    data, place = b"", 8
    while place < len(png):
        length, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        data += png[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    return "#" + zlib.decompress(data)[1:4].hex()


def assert_shown_light_and_dark(page: Path, scratch: Path) -> None:
    """A browser shows the page in the reader's colours, and nothing in it ran."""
    profile = f"--user-data-dir={scratch / 'profile'}"
    for scheme, colour in (("1", style.PAGE_LIGHT[0]), ("0", style.PAGE_DARK[0])):
        png = scratch / f"{scheme}.png"
        browse(f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1100,900", f"--screenshot={png}",
               page.as_uri(), profile)  # fmt: skip
        assert corner(png.read_bytes()) == colour
    shown = browse("--dump-dom", page.as_uri(), profile)
    assert "<title>taken</title>" not in shown
    assert "<script>" not in shown


def assert_no_wider(page: Path, scratch: Path, width: int) -> None:
    """In a window of this width the page needs no scrolling sideways."""
    text = page.read_text().replace("&", "&amp;").replace('"', "&quot;")
    frame = scratch / "frame.html"
    frame.write_text(
        f'<iframe id=f style="width:{width}px;height:900px;border:0" srcdoc="{text}"></iframe><script>'
        "onload=()=>{document.title='width '+document.getElementById('f').contentDocument.documentElement.scrollWidth}"
        "</script>"
    )
    profile = f"--user-data-dir={scratch / 'profile'}"
    shown = browse("--dump-dom", "--window-size=1300,1000", frame.as_uri(), profile)
    found = re.search(r"<title>width (\d+)</title>", shown)
    assert found, shown[:300]
    assert int(found[1]) <= width
