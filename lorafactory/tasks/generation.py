"""Supervised fine-tuning of a causal language model on prompts and completions, scored on what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from ..sources import locate
from . import SPLITS, answers, layout, register_task, tokens, writing
from .dialogue import Pair, Wording, pairs
from .reading import tables
from .splitting import Drawn

LAYOUT = "a folder with train.jsonl, .csv or .parquet (and test.jsonl, … beside it)"
CHATS = ("auto", "always", "never")


@register_task("generation")
class Generation(Drawn):
    """Only completions are learnt. Answers are generated greedily, or sampled where temperature > 0; padding stands on
    the left and is masked, so that a batch's size changes nothing but rounding."""

    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    generated: tuple[str, ...]  # splits that are answered; of others only the likelihood is measured

    @dataclass
    class Config(Drawn.Config):
        """prompt, completion: templates over the source's columns, as 'Q: {question}'. test_*: of another source that
        is scored ('': the same). scorer: number, exact, or none: the likelihood of the completion. chat: use the
        tokenizer's chat template (auto: where it has one); system: its system message. max_length: tokens of prompt and
        completion; a longer completion is cut, a longer prompt left out of training. packing: several training rows in
        one sequence of max_length. temperature: 0 is greedy; top_p, and samples a row: of sampling."""

        kind: str = "generation"
        prompt: str = "{prompt}"
        completion: str = "{completion}"
        test_source: str = ""
        test_subset: str = ""
        test_prompt: str = ""
        test_completion: str = ""
        scorer: str = "exact"
        chat: str = "auto"
        system: str = ""
        max_length: int = 512
        max_new_tokens: int = 256
        packing: bool = False
        temperature: float = 0.0
        top_p: float = 1.0
        samples: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.chat not in CHATS:
                raise UserError(f"task.chat={self.chat}: there are {', '.join(CHATS)}")
            for option in ("max_length", "max_new_tokens", "samples"):
                if getattr(self, option) < 1:
                    raise UserError(f"task.{option}={getattr(self, option)}: give 1 or more")
            if self.temperature < 0 or not 0 < self.top_p <= 1:
                raise UserError(f"task.temperature={self.temperature} must be 0 or more, task.top_p={self.top_p} in (0, 1]")
            for option, value in (("top_p", self.top_p), ("samples", self.samples)):
                if value != 1 and not self.temperature:
                    raise UserError(f"task.{option}={value} has no effect on greedy answers: set task.temperature, too")
            for option in ("test_subset", "test_prompt", "test_completion"):
                if getattr(self, option) and not self.test_source:
                    raise UserError(f"task.{option} describes task.test_source, which is empty: name it, or leave {option} out")

        def test_place(self) -> str:
            return f"{self.test_source}:{self.test_split}" if self.test_source else self.test_split

    def __init__(self, config: Any):
        super().__init__(config)
        self.judge = None if config.scorer == "none" else answers.scorer(config.scorer)
        self.generated = () if self.judge is None else ("selection", "test")
        self.primary = "log_likelihood" if self.judge is None else "exact_match"

    def read(self) -> dict[str, list[Pair]]:
        """split -> pairs of the source."""
        c = self.config
        return self.pairs_of("", c.source, c.subset, c.prompt, c.completion)

    def read_test(self) -> dict[str, list[Pair]]:
        """The same of the source that is scored, where it is another."""
        c = self.config
        return self.pairs_of("test_", c.test_source, c.test_subset, c.test_prompt or c.prompt, c.test_completion or c.completion)

    def pairs_of(self, prefix: str, source: str, subset: str, prompt: str, completion: str) -> dict[str, list[Pair]]:
        options = (f"task.{prefix}prompt", f"task.{prefix}completion")
        data = self.tables(prefix, source, subset)
        return {split: pairs(rows, split, prompt, completion, options) for split, rows in data.items()}

    def tables(self, prefix: str, source: str, subset: str) -> dict[str, Any]:
        where = locate(source, f"task.{prefix}source", LAYOUT)
        return tables(where, subset, None if prefix else self.config.revision, LAYOUT, f"task.{prefix}source")

    def load(self) -> None:
        raw, other = self.read(), self.config.test_source
        if other:
            raw |= {f"{other}:{split}": rows for split, rows in self.read_test().items()}
        rows = self.divide({s: np.zeros(len(p), int) for s, p in self.place(raw).items()})
        self.pairs = {s: [raw[o][i] for i in rows[s]] for s, o in self.source_split.items()}
        for split in self.generated:
            for pair in self.pairs[split]:
                self.check(pair)
        self.digest([[s, p.prompt, p.completion, p.reference] for s in SPLITS for p in self.pairs[s]])

    def check(self, pair: Pair) -> None:
        """Raises UserError for a row whose own answer could not be scored as right."""
        if self.judge is not None and self.judge(pair.completion, pair.completion) != 1:
            raise UserError(f"{pair.place}: task.scorer={self.config.scorer} finds no answer in {pair.completion[-60:]!r}")

    def prepare(self, processor: Any) -> None:
        c, self.processor = self.config, processor
        if c.max_length > processor.model_max_length:
            raise UserError(f"task.max_length={c.max_length}: this model takes at most {processor.model_max_length} tokens")
        self.wording = Wording(processor, c.chat, c.system)
        key = tokens.key(processor, self.fingerprint, c.max_length, self.wording.describe())
        found = tokens.cached(key, self._tokenise)
        self.splits, self.cut = {}, {}
        for split in SPLITS:
            prompts, cut = (found.pop(f"{split}.{n}").tolist() for n in ("prompt", "cut"))
            self.cut[split] = sum(cut)
            if split in self.generated:
                self._refuse_long(self.pairs[split], prompts)
            answered = [int(split in self.generated)] * len(prompts)
            self.splits[split] = tokens.rows(found, split, prompt=prompts, answered=answered)
        self.left_out = len(self.pairs["train"]) - len(self.splits["train"])

    def _refuse_long(self, rows: list[Pair], prompts: list[int]) -> None:
        new, limit = self.config.max_new_tokens, self.processor.model_max_length
        for pair, n in zip(rows, prompts, strict=True):
            if n + new > limit:
                told = f"{pair.place}: a prompt of {n} tokens and task.max_new_tokens={new} are more than the {limit}"
                raise UserError(f"{told} that this model takes")

    def _tokenise(self) -> dict[str, Tensor]:
        found, longest = {}, self.config.max_length
        for split in SPLITS:
            rows = self.wording.encode(self.pairs[split])
            if split == "train":
                rows = [(p, c) for p, c in rows if len(p) < longest and c]
                if not rows:
                    raise UserError(f"task.max_length={longest}: every training prompt is as long, so nothing is left to learn")
            kept = [(p, c[: max(0, longest - len(p))]) for p, c in rows]
            found[f"{split}.input_ids"] = torch.tensor([t for p, c in kept for t in p + c], dtype=torch.int32)
            found[f"{split}.ends"] = torch.tensor([len(p) + len(c) for p, c in kept]).cumsum(0)
            found[f"{split}.prompt"] = torch.tensor([len(p) for p, _ in kept])
            found[f"{split}.cut"] = torch.tensor([len(a) < len(b) for (_, a), (_, b) in zip(kept, rows, strict=True)])
        return found

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        about = {n: torch.tensor([r[n] for r in rows]) for n in ("prompt", "answered")}
        return layout.side_by_side(rows, self.processor.pad_token_id) | about

    def training_batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        c, pad = self.config, self.processor.pad_token_id
        return layout.packed(rows, c.max_length, pad) if c.packing else layout.side_by_side(rows, pad)

    def size(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != layout.IGNORED).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return layout.token_losses(model, batch).sum()

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """A row: log_likelihood of its completion, summed over so many tokens; and where it is answered, texts, how
        many tokens each has, and whether it ended by itself."""
        learnt = (batch["labels"] != layout.IGNORED).sum(1).tolist()
        sums = layout.token_losses(model, batch).sum(1).neg().tolist() if any(learnt) else [0.0] * len(learnt)
        found: list[dict[str, Any]] = [{"log_likelihood": s, "tokens": n} for s, n in zip(sums, learnt, strict=True)]
        if batch["answered"].any():
            prompts = [ids[:n] for ids, n in zip(batch["input_ids"], batch["prompt"].tolist(), strict=True)]
            for row, answer in zip(found, writing.answer(model, prompts, self.processor, self.config), strict=True):
                row |= answer
        return found

    def references(self, split: str) -> list[Any]:
        return [p.reference for p in self.pairs[split]]

    def metrics(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        """log_likelihood: of the completions, a token, in nats. Where rows were answered, shares over all answers:
        exact_match; no_answer: nothing in it to score (counts as wrong); ended: by themselves, not by max_new_tokens;
        and new_tokens, their mean number."""
        found: dict[str, Any] = {}
        if learnt := sum(p["tokens"] for p in predictions):
            found["log_likelihood"] = sum(p["log_likelihood"] for p in predictions) / learnt
        if answered := [(p, r) for p, r in zip(predictions, references, strict=True) if "texts" in p]:
            found |= self.mark(answered) | writing.summary([p for p, _ in answered])
        return found

    def mark(self, answered: list[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
        """The scorer's own metrics of (prediction, reference)."""
        assert self.judge is not None
        marks = [self.judge(text, reference) for p, reference in answered for text in p["texts"]]
        return {"exact_match": sum(m or 0.0 for m in marks) / len(marks), "no_answer": marks.count(None) / len(marks)}

    def given(self) -> dict[str, list[Any]]:
        return {s: [p.prompt for p in rows] for s, rows in self.pairs.items()}

    def describe(self) -> dict[str, Any]:
        """cut: completions cut at max_length; left_out: training rows whose prompt alone is as long."""
        sizes = {s: len(self.splits[s]) for s in SPLITS}
        about = {"sizes": sizes, "cut": self.cut, "left_out": self.left_out}
        return super().describe() | about | self.wording.describe()
