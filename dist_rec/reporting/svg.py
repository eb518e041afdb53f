"""What every chart is made of: colours, scales with round ticks, a frame with axes, a legend, SVG elements as text.

Lengths are in pixels, y grows downwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind readers too. Source: Okabe and Ito 2008, "Color Universal Design"."""
DASHES = ("", "7 3", "2 2", "8 3 2 3")
"""Lines differ in these as well, for print without colours and for more lines than colours."""

INK, GREY, FAINT = "#222222", "#777777", "#dddddd"
FONT = 12
_NAME = 34  # characters of a name in a legend
_TICK = 45  # room of a tick label of an x axis
_CHARACTER = 0.58  # mean width of a character of the font, in units of its size


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """`<name attributes>content</name>`; numbers are rounded to 0.01, and _ in a name stands for -."""
    words = [name]
    for key, value in attributes.items():
        shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        words.append(f'{key.replace("_", "-")}="{escape(shown)}"')
    return f"<{' '.join(words)}>{content}</{name}>"


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = FONT, **attributes: object) -> str:
    """Words at a point; anchor: start, middle or end."""
    attributes = {"fill": INK, **attributes}
    return element("text", escape(words), x=float(x), y=float(y), text_anchor=anchor, font_size=size, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    """A straight line."""
    attributes = {"stroke": INK, **attributes}
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), **attributes)


def rectangle(x: float, y: float, width: float, height: float, content: str = "", **attributes: object) -> str:
    """A filled rectangle."""
    place = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
    return element("rect", content, **place, **attributes)


def hint(words: str) -> str:
    """What a browser shows while the mouse is over the element whose content this is."""
    return element("title", escape(words))


def path(points: Iterable[tuple[float, float]], **attributes: object) -> str:
    """A polyline."""
    steps = " ".join(f"{'M' if i == 0 else 'L'}{x:.2f} {y:.2f}" for i, (x, y) in enumerate(points))
    return element("path", d=steps, **attributes)


def width_of(words: str, size: int = FONT) -> float:
    """About how wide words are."""
    return len(words) * size * _CHARACTER


def shortened(words: str, most: int) -> str:
    """At most `most` characters."""
    return words if len(words) <= most else words[: most - 1] + "…"


_FONTS = "Helvetica, Arial, sans-serif"


def picture(width: float, height: float, parts: Iterable[str], title: str) -> str:
    """An SVG element to be put into a page, `title` for readers who do not see it; scales down where room is scarce."""
    return element(
        "svg",
        "\n".join([hint(title), *parts]),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=round(width),
        height=round(height),
        role="img",
        font_family=_FONTS,
        style="max-width:100%;height:auto;background:#ffffff",
    )


def document(pictures: Sequence[str]) -> str:
    """Pictures one below the other, as a file of its own."""
    parts, width, y = [], 0.0, 0.0
    for one in pictures:
        head, _, inner = one.partition(">")
        wide, high = (float(size) for size in re.findall(r'viewBox="0 0 (\S+) (\S+)"', head)[0])
        parts.append(element("g", inner.removesuffix("</svg>"), transform=f"translate(0 {y:.0f})"))
        width, y = max(width, wide), y + high
    background = rectangle(0, 0, width, y, fill="#ffffff")
    return element(
        "svg",
        "\n".join([background, *parts]),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {y:.0f}",
        width=round(width),
        height=round(y),
        font_family=_FONTS,
    )


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) from `low` to `high`, about `most` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def number(value: float) -> str:
    """A number as short as it stays readable: 0.05, 12k, 3.5M, 2e-05."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 10_000:
        for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= limit:
                return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels linearly: `low` to `start`, `high` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def extent(values: Iterable[float], margin: float = 0.05) -> tuple[float, float]:
    """(low, high) with a margin around the finite values; never empty."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    room = (high - low) * margin
    return low - room, high + room


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart, with its scales."""

    x: Scale
    y: Scale

    def axes(self, x_label: str, y_label: str, *, y_ticks: bool = True) -> list[str]:
        """Grid, tick labels and axis titles."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        parts = []
        for value in ticks(self.x.low, self.x.high, min(7, int((right - left) / _TICK))):
            at = self.x(value)
            parts += [line(at, top, at, bottom, stroke=FAINT), text(at, bottom + 16, number(value), anchor="middle")]
        for value in ticks(self.y.low, self.y.high, 6) if y_ticks else ():
            at = self.y(value)
            parts += [line(left, at, right, at, stroke=FAINT), text(left - 6, at + 4, number(value), anchor="end")]
        parts += [line(left, bottom, right, bottom), line(left, top, left, bottom)]
        parts.append(text((left + right) / 2, bottom + 34, x_label, anchor="middle"))
        if y_label:
            middle = (top + bottom) / 2
            parts.append(text(14, middle, y_label, anchor="middle", transform=f"rotate(-90 14 {middle:.1f})"))
        return parts


def heading(title: str, subtitle: str = "") -> list[str]:
    """A chart's title, and what it needs to be understood in a smaller line."""
    parts = [text(8, 20, title, size=15, font_weight="bold")]
    return [*parts, text(8, 37, subtitle, fill=GREY)] if subtitle else parts


class Key(NamedTuple):
    """What a legend says of a series; dashes: of its line, None for a filled mark."""

    name: str
    colour: str
    dashes: str | None


def legend(keys: Sequence[Key], x: float, y: float) -> list[str]:
    """A row for each series."""
    parts = []
    for i, key in enumerate(keys):
        at = y + 18 * i
        if key.dashes is None:
            parts.append(rectangle(x, at - 9, 22, 11, fill=key.colour))
        else:
            parts.append(
                line(x, at - 4, x + 22, at - 4, stroke=key.colour, stroke_width=2, stroke_dasharray=key.dashes)
            )
        parts.append(text(x + 28, at, shortened(key.name, _NAME)))
    return parts


def dash(i: int) -> str:
    """The dashes of line number i; 28 lines differ in colour or dashes."""
    return DASHES[(i + 2 * (i // len(COLOURS))) % len(DASHES)]


def legend_width(keys: Sequence[Key]) -> float:
    """Room that `legend` takes."""
    return 44 + max((width_of(shortened(key.name, _NAME)) for key in keys), default=0)
