"""What a generated text answers, and whether that is right.

A scorer is a function (text, reference) -> 1.0, 0.0, or None where the text holds no answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from ..errors import UserError

Scorer = Callable[[str, str], float | None]
# a number, its sign and currency on either side, thousands in threes, a fraction; not the tail of a word or another number
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![\w)\]])-)?[$€£¥]?(?P<inner>-)?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,300}|(?=\.\d))"
    r"(?P<part>\.\d+)?(?:/(?P<under>[1-9]\d*))?"
)
_NEXT = re.compile(r"\n\s*(?:#+\s*)?(?:question|problem|instruction|user|human|q)\b[^\n]{0,20}:", re.IGNORECASE)
_CUE = re.compile(r"answer\s*(?:is|:|=)\s*:?", re.IGNORECASE)
_PLAIN = ((r"{,}", ","), (r"\,", ""), (r"\!", ""), (r"\$", "$"), ("\u2212", "-"), ("\u2013", "-"))


def final_number(text: str) -> Fraction | None:
    """The number that a worked answer ends in; None: it has none.

    Text from the next question on is not part of it. Then the first of these that is there decides: what stands after
    the first `####`; in the last `\\boxed{}`; after the last 'answer is' (or ':', '='), behind an equals sign if the
    line has one; else the last number of all. Currency and percent signs, thousands separators, trailing zeros and
    units do not count: '$1,234.50', '29.00', '10%' are 1234.5, 29, 10."""
    for tex, plain in _PLAIN:
        text = text.replace(tex, plain)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = text[: found.start()] if (found := _NEXT.search(text)) else text
    if "####" in text:
        return _first(text.split("####", 2)[1])
    if boxes := re.findall(r"\\boxed\{([^{}]*)\}", text):
        return _first(_behind_equals(boxes[-1]))
    if cues := list(_CUE.finditer(text)):
        line = text[cues[-1].end() :].strip().partition("\n")[0]
        if (number := _first(_behind_equals(line))) is not None:
            return number
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def number(text: str, reference: str) -> float | None:
    """Whether both end in the same number, exactly."""
    found = final_number(text)
    return None if found is None else float(found == final_number(reference))


def exact(text: str, reference: str) -> float | None:
    """Whether both are the same words; white space between them does not count."""
    words = text.split()
    return float(words == reference.split()) if words else None


SCORERS: dict[str, Scorer] = {"number": number, "exact": exact}


def scorer(name: str) -> Scorer:
    if name not in SCORERS:
        raise UserError(f"task.scorer={name}: there are {', '.join(SCORERS)}, and none")
    return SCORERS[name]


def _behind_equals(text: str) -> str:
    return text.rpartition("=")[2]


def _first(text: str) -> Fraction | None:
    found = _NUMBER.search(text)
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Fraction:
    number = Fraction((found["whole"].replace(",", "") or "0") + (found["part"] or "")) / int(found["under"] or 1)
    return -number if found["sign"] or found["inner"] else number
