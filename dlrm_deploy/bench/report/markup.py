"""HTML and SVG built from calls. Text is escaped unless it is markup already: nothing from a row can become a tag."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_VOID = frozenset({"meta", "input", "br", "hr", "path", "line", "rect", "circle", "polygon", "polyline"})


class Markup(str):
    """Text that is markup. Only this module and the page's own files make it."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """`<name attributes>children</name>`.

    Children that are plain text are escaped, None is left out. Of the attributes, None and False are left out, True
    stands alone, floats are rounded to a hundredth; underscores become hyphens, and a trailing one, as in `class_`, is
    dropped.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if not children and name in _VOID:
        return Markup(f"<{name}{written}>" if name in ("meta", "input", "br", "hr") else f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str | None]) -> Markup:
    """Pieces one after the other, plain text escaped."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if name == "viewbox":
        name = "viewBox"
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{escape(text)}"'


def table(headings: Sequence[str], lines: Iterable[Sequence[str]], caption: str) -> Markup:
    """A table whose first column heads its rows. Columns of numbers are set to the right, others to the left."""
    cells = [list(line) for line in lines]
    kinds = [
        "word" if any(line[i] and not line[i][0].isdigit() for line in cells) else None for i in range(len(headings))
    ]
    head = tag("tr", *(tag("th", h, scope="col", class_=kind) for h, kind in zip(headings, kinds, strict=True)))
    body = [
        tag(
            "tr",
            tag("th", first, scope="row"),
            *(tag("td", cell or "–", class_=kind) for cell, kind in zip(rest, kinds[1:], strict=True)),
        )
        for first, *rest in cells
    ]
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def folded(summary: str, *children: str | None, **attributes: object) -> Markup:
    """Content behind a line that opens it."""
    return tag("details", tag("summary", summary), *children, **attributes)
