"""HTML that is safe by construction: text is escaped unless it came out of here."""

from __future__ import annotations

import html
import math
import re

from streammerge.errors import escaped

_VOID = frozenset({"meta"})
_WORD = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")
_LONGEST = 160


class Html(str):
    """Markup; any other string is text."""

    __slots__ = ()


Child = str | None


def element(tag: str, *children: Child, **attributes: object) -> Html:
    """An element. Children are text, or Html; None is left out. `class_` is `class`, `view_box` is `viewBox`,
    other underscores are hyphens; attributes that are None or False are left out.
    """
    assert _WORD.fullmatch(tag), tag
    parts = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = {"class_": "class", "view_box": "viewBox"}.get(key, key.replace("_", "-"))
        assert _WORD.fullmatch(name), name
        parts.append(name if value is True else f'{name}="{text(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if tag in _VOID else f"{opening}{joined(*children)}</{tag}>")


def joined(*children: Child) -> Html:
    """Children one after the other, text escaped."""
    return Html("".join(child if isinstance(child, Html) else text(child) for child in children if child is not None))


def text(value: object) -> str:
    """Text from anywhere: what a terminal or a page could act on is escaped, what has no end is cut."""
    plain = str(value)
    return html.escape("\n".join(escaped(line) for line in plain.split("\n")), quote=True)


def prose(sentence: str) -> Html:
    """A sentence in which what stands between backticks is code."""
    parts = sentence.split("`")
    if len(parts) % 2 == 0:
        return joined(sentence)
    return joined(*(element("code", part) if place % 2 else part for place, part in enumerate(parts)))


def short(name: str) -> str:
    """A name of at most 160 characters."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0.0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        plain = f"{value:,.{places}f}"
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    return f"{value:.{max(digits - 2, 0)}e}".replace("e-0", "e-").replace("e+0", "e")


def percent(value: float | None) -> str:
    """A share, as percents; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    places = 0 if value >= 0.0995 or value == 0.0 else 1 if value >= 0.0005 else 3
    return f"{100.0 * value:.{places}f} %"


def seconds(value: float | None) -> str:
    """A time, in seconds or minutes; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value >= 600:
        return f"{value / 60:.0f} min"
    return f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"
