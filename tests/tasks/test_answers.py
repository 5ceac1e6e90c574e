"""B49: which number a worked answer ends in, by a written rule."""

from fractions import Fraction

import pytest
from samples import refused

from lorafactory.tasks import answers

NUMBERS = {
    "72, in total": 72,
    "$200,000.": 200000,
    "29.00": 29,
    "-3": -3,
    "1,234.50": Fraction("1234.5"),
    r"which gives \boxed{18}.": 18,
    r"\boxed{x = 7} and not 9": 7,
    r"\boxed{\frac{3}{4}}": Fraction(3, 4),
    "10%": 10,
    "it costs -$5": -5,
    "it costs $-5": -5,
    "\u22124": -4,
    "8-5=3": 3,
    "10-3": 3,
    r"\$1{,}000": 1000,
    "x = .5": Fraction(1, 2),
    "3, 4": 4,
    "3,4": 4,
    "#### 18": 18,
    "#### $1,000 a week, for 4 weeks": 1000,
    "#### 5\nQuestion: 3 and 4 make 7": 5,
    "so 6.\n\nQ: what is 9?\nA: 9": 6,
    "The answer is: 8": 8,
    "The answer is 18 dollars a day for 7 days.": 18,
    "The answer is 5 + 3 = 8.\nI checked it 2 times.": 8,
    "Answer: 42 (of 100)": 42,
    "2 apples and 3 pears are **5** in all": 5,
    "12km": 12,
    "no number at all": None,
    "H2O": None,
    ",": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS, ids=range(len(NUMBERS)))
def test_the_final_number(text):
    assert answers.final_number(text) == NUMBERS[text]


def test_both_sides_are_read_by_the_same_rule():
    reference = "She sells 16 - 3 = <<16-3=13>>13 eggs.\n#### 1,013"
    assert answers.number("that is $1013.00 a year", reference) == 1
    assert answers.number("13", reference) == 0
    assert answers.number("I cannot say", reference) is None


def test_a_flood_of_digits_is_a_wrong_answer():
    assert answers.number("9" * 20_000, "#### 5") == 0


def test_exact_words():
    assert answers.exact(" mother-in-law\n", "mother-in-law") == 1
    assert answers.exact("Mother-in-law", "mother-in-law") == 0
    assert answers.exact("  ", "mother") is None


def test_an_unknown_scorer():
    refused(lambda: answers.scorer("bleu"), "task.scorer=bleu", "number", "exact")
