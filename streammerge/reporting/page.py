"""The frame around every page: its head, its style, its sections. No script, and a policy that allows none."""

from __future__ import annotations

from streammerge.reporting.markup import Child, Html, element, joined, prose
from streammerge.reporting.style import CSS

_MOST_LINES = 100
# a browser that obeys it loads nothing from anywhere and runs no script, even if one were smuggled in
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, lead: Child, *sections: Html | None) -> str:
    """A whole document. `lead` stands below the title."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Html(CSS)),
    )
    body = element(
        "body",
        element("header", element("h1", title), element("p", lead, class_="lead")),
        element("main", *sections),
        element("footer", element("p", "Written by streammerge.")),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def section(title: str, note: str | None, *content: Child) -> Html:
    """A part of a page under a heading; `note` is the sentence that says what to see in it."""
    return element("section", element("h2", title), note and element("p", prose(note), class_="note"), *content)


def table(head: list[str], rows: list[list[Child]], *, numeric: int = 1, caption: str | None = None) -> Html:
    """A table whose first column names its rows; columns from `numeric` on are numbers."""
    cells = [element("th", name, scope="col", class_="n" if i >= numeric else None) for i, name in enumerate(head)]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_="n" if i >= numeric else None) for i, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    ]
    whole = element(
        "table",
        caption and element("caption", caption),
        element("thead", element("tr", *cells)),
        element("tbody", *body),
    )
    return scrolled(whole, caption or head[0])


def scrolled(content: Html, label: str) -> Html:
    """Content that may be wider than a phone: it scrolls by itself, with the keyboard too."""
    return element("div", content, class_="wide", tabindex="0", role="region", aria_label=label)


def facts(pairs: list[tuple[str, Child]]) -> Html:
    """Names and what they are, as a list."""
    return element("dl", joined(*(element("div", element("dt", name), element("dd", told)) for name, told in pairs)))


def folded(summary: str, *content: Child) -> Html:
    """Content that a reader opens."""
    return element("details", element("summary", summary), *content)


def lines(items: list[str], class_: str | None = None) -> Html:
    """A list of sentences, at most 100 of them."""
    shown = [*items[:_MOST_LINES], *([f"and {len(items) - _MOST_LINES:,} more"] if len(items) > _MOST_LINES else [])]
    return element("ul", *(element("li", prose(item)) for item in shown), class_=class_)
