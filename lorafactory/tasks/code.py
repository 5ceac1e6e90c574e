"""Fine-tuning on programs, scored by running what the model writes for HumanEval's problems (arXiv 2107.03374)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, List  # noqa: UP035  OmegaConf's spelling

from ..errors import UserError
from . import register_task, sandbox
from .dialogue import Pair, pairs
from .generation import Generation
from .metrics import pass_at_k

ASK = "Complete this Python function. Answer with the whole function.\n\n```python\n{prompt}```"
_BLOCK = re.compile(r"```(?:python|py)?[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_NEXT = re.compile(r"\n(?=\S)(?![)\]}])")  # a line that is not indented ends the function that was being completed
COLUMNS = ("prompt", "test", "entry_point")


@register_task("code")
class Code(Generation):
    """Off unless allow_code_execution: see docs/code.md for what the sandbox does and does not keep out. Runs are
    selected by the likelihood of held-out training completions: problems are for scoring only."""

    @dataclass
    class Config(Generation.Config):
        """source, prompt, completion: what is trained on. test_source: problems with HumanEval's columns; test_prompt:
        how the model is asked, '{prompt}' alone for a model that only continues text. k: of pass@k, at most samples.
        seconds: a program's time."""

        kind: str = "code"
        test_source: str = "openai/openai_humaneval"
        test_prompt: str = ASK
        k: List[int] = field(default_factory=lambda: [1])  # noqa: UP006
        allow_code_execution: bool = False
        seconds: float = 10.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.k or not all(1 <= k <= self.samples for k in self.k):
                raise UserError(f"task.k={list(self.k)}: give numbers from 1 to task.samples={self.samples}")
            if self.test_completion or self.scorer != Generation.Config.scorer:
                raise UserError("task.test_completion and task.scorer have no effect on problems with tests: leave them out")

    def __init__(self, config: Any):
        super().__init__(config)
        self.generated, self.primary = ("test",), f"pass@{config.k[0]}"

    @property
    def selects(self) -> str:
        return "log_likelihood"

    def load(self) -> None:
        if not self.config.allow_code_execution:
            raise UserError("this task runs programs that the model wrote, in a sandbox that has limits (docs/code.md): "
                            "task.allow_code_execution=true allows it")  # fmt: skip
        if why := sandbox.available():
            raise UserError(f"cannot run programs written by a model: {why}")
        super().load()

    def read_test(self) -> dict[str, list[Pair]]:
        c, found = self.config, {}
        for split, data in self.tables("test_", c.test_source, c.test_subset).items():
            rows = pairs(data, split, c.test_prompt, "{canonical_solution}", ("task.test_prompt", "task.test_source"))
            if lost := [n for n in COLUMNS if n not in data.column_names]:
                raise UserError(f"task.test_source={c.test_source}: no column {lost[0]!r}; problems have {', '.join(COLUMNS)}")
            columns = {n: data[n][:] for n in COLUMNS}
            for i, pair in enumerate(rows):
                pair.reference = {n: values[i] for n, values in columns.items()}
            found[split] = rows
        return {c.test_split: rows} if len(found) == 1 else found  # its authors' file has one split, without a name

    def check(self, pair: Pair) -> None:
        """Its authors' solution is not run again: tests/tasks/test_code.py does."""

    def mark(self, answered: list[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
        """pass@k; and which shares of all programs ended in another way than by their tests."""
        programs = [program(text, reference) for p, reference in answered for text in p["texts"]]
        verdicts = sandbox.run(programs, sandbox.Limits(seconds=self.config.seconds))
        size = self.config.samples
        passed = [sum(v.passed for v in verdicts[i : i + size]) for i in range(0, len(verdicts), size)]
        found: dict[str, Any] = {
            f"pass@{k}": sum(pass_at_k(size, c, k) for c in passed) / len(passed) for k in self.config.k
        }
        ends = Counter(v.reason.partition(":")[0] for v in verdicts)
        return found | {"programs": {reason: n for reason, n in sorted(ends.items())}}


def program(text: str, problem: dict[str, str]) -> str:
    """What is run for an answer: the function, its tests, and the call that runs them.

    The first code block that defines the function, or the text if it does, with what stands before the function in the
    prompt (imports, helpers); else the first block, or the text, continues the prompt until the function ends."""
    prompt, name = problem["prompt"], problem["entry_point"]
    blocks = _BLOCK.findall(text)
    defines = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    whole = next((b for b in [*blocks, text] if defines.search(b)), None)
    if whole is not None:
        before = defines.search(prompt)
        solution = (prompt[: before.start()] if before else "") + "\n" + whole
    else:
        rest = blocks[0] if blocks else text
        solution = prompt + _NEXT.split("\n" + rest if not rest[:1].isspace() else rest, maxsplit=1)[0]
    return f"{solution}\n\n{problem['test']}\n\ncheck({name})\n"
