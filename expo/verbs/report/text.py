"""Texts that others wrote, made safe to look at: nothing in them is markup, and nothing in them is invisible."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

from expo.stats.means import Interval

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)
"""Control characters but tab and line feed, marks that reverse what follows, and halves of surrogate pairs."""

MINUS = "−"


def visible(text: str) -> str:
    """Text in which control characters, bidirectional marks and lone surrogates are written out, as ␀ or [U+202E].

    `page.js` does the same.
    """
    return UNSEEN.sub(_written_out, text.replace("\r\n", "\n"))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"[U+{code:04X}]"


def escaped(text: str) -> str:
    """Text for HTML, between tags or in a quoted attribute."""
    return html.escape(visible(text))


def cut(text: str, limit: int) -> tuple[str, int]:
    """The start of a text, and how many characters are missing."""
    return text[:limit], max(len(text) - limit, 0)


# --- numbers ------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    """A number with a minus sign of its own; – where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace("-", MINUS) if round(value, digits) else f"{0:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign, + included."""
    text = number(value, digits)
    return text if value is None or text[0] in f"{MINUS}–" or not round(value, digits) else f"+{text}"


def digits_for(values: Iterable[float | None]) -> int:
    """Decimals that show two significant digits of the smallest size among these, between 0 and 6; 2 without any."""
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and value]
    return min(max(1 - math.floor(math.log10(min(sizes))), 0), 6) if sizes else 2


def shown_interval(interval: Interval | None, digits: int) -> str:
    """An interval for a sentence."""
    return "" if interval is None else f"{signed(interval[0], digits)} to {signed(interval[1], digits)}"


def probability(p: float | None) -> str:
    """A p value for a sentence."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def percent(share: float | None) -> str:
    """A share, such as 61 %."""
    return "–" if share is None else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
