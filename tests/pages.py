"""HTML pages read back: their text by section, their tables and pictures, and what in them could reach outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta"}


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
