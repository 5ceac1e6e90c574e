"""HumanEval: what is run for an answer, and how often it passes. The sandbox has tests of its own."""

import pytest
from samples import make, refused
from test_generation import base

from lorafactory.errors import UserError
from lorafactory.tasks import get_task, sandbox
from lorafactory.tasks.code import program

PROMPT = "from math import sqrt\n\n\ndef helper(x):\n    return sqrt(x)\n\n\ndef root(x):\n    '''The root.'''\n"
TEST = "def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(4) == 2\n"
PROBLEM = {"prompt": PROMPT, "test": TEST, "entry_point": "root"}

safe = pytest.mark.skipif(sandbox.available() is not None, reason=str(sandbox.available()))
RIGHT = {
    "continued": "    return helper(x)\n",
    "continued, and on": "    return helper(x)\n\n\ndef other(y):\n    return 1 / 0\n\nprint(root(1 / 0))\n",
    "in a block": "Sure! Here it is:\n```python\ndef root(x):\n    return helper(x)\n```\nIt takes the root. root(1/0)",
    "with imports": "```\nimport math\n\ndef root(x):\n    return math.sqrt(x)\n```",
    "a block that continues": "```python\n    return helper(x)\n```",
    "cut off": "```python\ndef root(x):\n    return helper(x)\n",
    "the second block": "```sh\npip install numpy\n```\n```python\ndef root(x):\n    return sqrt(x)\n```",
    "bare": "def root(x):\n    return sqrt(x)\n",
}
WRONG = {
    "wrong": "    return x\n",
    "empty": "",
    "words": "I cannot do that.",
    "raises": "    raise ValueError(x)\n",
    "syntax": "```python\ndef root(x)\n    return helper(x)\n```",
    "another name": "```python\ndef square_root(x):\n    return helper(x)\n```",
    "its own check": "```python\ndef root(x):\n    return 0\n\ndef check(candidate):\n    pass\n```",
    "an early end": "    import sys; sys.exit(0)\n",
}


@safe
def test_what_is_run_for_an_answer():
    """B52: the tests reach the solution, and only a right one passes."""
    answers = {**RIGHT, **WRONG}
    verdicts = sandbox.run([program(text, PROBLEM) for text in answers.values()], sandbox.Limits(seconds=5))
    passed = {name for name, v in zip(answers, verdicts, strict=True) if v.passed}
    assert passed == set(RIGHT), {n: v.reason for n, v in zip(answers, verdicts, strict=True)}


def predicted(*texts):
    said = {"texts": list(texts), "new_tokens": [1] * len(texts), "ended": [True] * len(texts)}
    return {"log_likelihood": -1.0, "tokens": 2, **said}


@safe
def test_pass_at_k():
    task = make("code", samples=4, temperature=0.8, k=[1, 2], allow_code_execution=True)
    right, wrong = RIGHT["continued"], WRONG["wrong"]
    rows = [predicted(right, wrong, wrong, wrong), predicted(*[wrong] * 4), predicted(*[right] * 4)]
    scores = task.metrics(rows, [PROBLEM] * 3)
    assert task.primary == "pass@1" and task.selects == "log_likelihood" and scores["log_likelihood"] == -0.5
    assert scores["pass@1"] == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert scores["pass@2"] == pytest.approx((1 / 2 + 0 + 1) / 3)  # 1 - C(3,2)/C(4,2) of the first
    assert scores["programs"] == {"failed": 7, "passed": 5}
    assert task.metrics([predicted(*[wrong] * 4)], [PROBLEM])["pass@1"] == 0


@safe
def test_the_authors_own_solutions(data):
    """All 164, as answers in a code block and as plain continuations."""
    (tmp,) = {str(data / "humaneval")}
    task = make("code", test_source=tmp, allow_code_execution=True)
    rows = task.read_test()["test"]
    assert len(rows) == 164 and rows[0].prompt.startswith("Complete this") and "has_close_elements" in rows[0].prompt
    texts = [p.completion if i % 2 else f"```python\n{p.reference['prompt']}{p.completion}```" for i, p in enumerate(rows)]
    scores = task.metrics([predicted(t) for t in texts], [p.reference for p in rows])
    assert scores["pass@1"] == 1, scores["programs"]


@safe
def test_a_run_is_scored_on_problems_and_selected_without_them(data, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(f'{{"prompt": "{i}?", "completion": "{i}!"}}' for i in range(20)))
    task = make("code", name="code", source=str(tmp_path), test_source=str(data / "humaneval"), test_size=3, max_length=2048,
                max_new_tokens=4, allow_code_execution=True)  # fmt: skip
    task.load()
    model, processor = base()
    task.prepare(processor)
    for split, wanted in (("selection", {"log_likelihood"}), ("test", {"log_likelihood", "pass@1", "programs"})):
        rows = [task.splits[split][i] for i in range(len(task.splits[split]))]
        found = task.predict(model, task.collate(rows))
        assert wanted <= set(task.metrics(found, task.references(split)))
        assert ("texts" in found[0]) == (split == "test")


def test_nothing_runs_unasked(tmp_path):
    refused(make("code").load, "task.allow_code_execution=true", "docs/code.md")
    refused(lambda: make("code", k=[2]), "task.k=[2]", "task.samples=1")
    refused(lambda: make("code", scorer="number"), "task.scorer", "no effect")
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "canonical_solution": "b"}\n')
    with pytest.raises(UserError, match="no column 'test'"):
        make("code", test_source=str(tmp_path)).read_test()
    assert get_task("code")
