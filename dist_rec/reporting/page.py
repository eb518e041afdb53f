"""One self-contained HTML page of sections: no script, no other file, nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

_STYLE = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #222; background: #fff; max-width: 1240px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { border-bottom: 2px solid #ddd; margin-top: 2em; }
h3 { margin: 1.6em 0 .3em; font-size: 1em; } p { max-width: 70em; } p.quiet { color: #666; }
nav a { margin-right: 1.2em; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: .8em 0; } caption { text-align: left; color: #666; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #bbb; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
tr.first td { border-top: 2px solid #bbb; } td.strong { font-weight: bold; }
figure { display: inline-block; margin: .5em 0; vertical-align: top; break-inside: avoid; }
"""


class Section(NamedTuple):
    """A section: the name that links to it, its title, and its content as HTML."""

    name: str
    title: str
    content: Sequence[str]


class Cell(NamedTuple):
    """A cell of a table that stands out."""

    text: str
    strong: bool = False


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page, with a line of links to its sections."""
    links = "".join(f'<a href="#{escape(s.name)}">{escape(s.title)}</a>' for s in sections)
    parts = ["<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8"/>',
             f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
             f"<h1>{escape(title)}</h1>", quiet(subtitle), f"<nav>{links}</nav>"]  # fmt: skip
    for section in sections:
        parts.append(f'<section id="{escape(section.name)}">\n<h2>{escape(section.title)}</h2>')
        parts += [*section.content, "</section>"]
    return "\n".join([*parts, "</body>", "</html>", ""])


def paragraph(words: str) -> str:
    """Words as a paragraph."""
    return f"<p>{escape(words)}</p>"


def quiet(words: str) -> str:
    """Words as a paragraph that does not ask for attention."""
    return f'<p class="quiet">{escape(words)}</p>'


def heading(words: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(words)}</h3>"


def row(pictures: Iterable[str]) -> str:
    """Pictures beside each other, as far as there is room."""
    figures = "\n".join(f"<figure>{picture}</figure>" for picture in pictures)
    return f"<div>{figures}</div>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Cell]], starts: Iterable[int] = ()) -> str:
    """A table; starts: numbers of the rows that begin a new group."""
    first = set(starts)
    parts = ['<div class="scroll"><table>', _line("th", columns)]
    parts += [_line("td", cells, ' class="first"' if i in first else "") for i, cells in enumerate(rows)]
    return "\n".join([*parts, "</table></div>"])


def _line(tag: str, cells: Sequence[str | Cell], attribute: str = "") -> str:
    parts = []
    for cell in cells:
        strong = isinstance(cell, Cell) and cell.strong
        words = escape(cell.text if isinstance(cell, Cell) else cell)
        parts.append(f'<{tag} class="strong">{words}</{tag}>' if strong else f"<{tag}>{words}</{tag}>")
    return f"<tr{attribute}>{''.join(parts)}</tr>"
