"""Prompts and completions: from a source's columns to text, from text to tokens."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .reading import Places, require, texts


@dataclass
class Pair:
    """reference: what a scorer compares an answer with, fit for JSON; place: what an error calls the row."""

    prompt: str
    completion: str
    reference: Any
    place: str


def pairs(data: Any, split: str, prompt: str, completion: str, options: tuple[str, str]) -> list[Pair]:
    """Rows of a datasets.Dataset. prompt, completion: templates over its columns, as 'Q: {question}'; options: how the
    user set them. Raises UserError for a column that is not there, or that holds no text."""
    wanted = [(o, c) for o, t in zip(options, (prompt, completion), strict=True) for c in _fields(o, t)]
    require(data, split, wanted)
    columns = {c: texts(data, split, c) for _, c in wanted}
    found = []
    for i, place in enumerate(Places(split, len(data))):
        row = {c: values[i] for c, values in columns.items()}
        answer = completion.format_map(row)
        found.append(Pair(prompt.format_map(row), answer, answer, place))
    return found


def _fields(option: str, template: str) -> Iterator[str]:
    try:
        fields = [f for _, f, _, _ in string.Formatter().parse(template) if f is not None]
    except ValueError as e:
        raise UserError(f"{option}={template!r} is no template: {e}; columns stand in braces, as {{question}}") from e
    if not fields or not all(f.isidentifier() for f in fields):
        raise UserError(f"{option}={template!r} names no column: columns stand in braces, as {{question}}")
    yield from fields


class Wording:
    """How a pair becomes tokens for one tokenizer: its chat template where it has one (chat=auto), or the bare texts.

    A completion's tokens end with the end token, which is learnt as any other; padding is told from it by place. What a
    template writes behind it is not learnt: generation ends there."""

    def __init__(self, processor: Any, chat: str, system: str):
        has = getattr(processor, "chat_template", None) is not None
        if chat == "always" and not has:
            raise UserError("task.chat=always, but this tokenizer has no chat template: task.chat=never")
        self.processor, self.system, self.chat = processor, system, has and chat != "never"
        if system and not self.chat:
            raise UserError(f"task.system={system!r} has no effect without a chat template: leave it empty")
        if processor.eos_token_id is None:
            raise UserError("this tokenizer has no end token, so what is generated would never end: give another model")

    def texts(self, pair: Pair) -> tuple[str, str]:
        """(what the model is given, what it shall write)."""
        if not self.chat:
            return pair.prompt, pair.completion
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*system, {"role": "user", "content": pair.prompt}]
        given = self.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        if not pair.completion:
            return given, ""
        answered = [*asked, {"role": "assistant", "content": pair.completion}]
        whole = self.processor.apply_chat_template(answered, tokenize=False)
        if not whole.startswith(given):
            raise UserError("this tokenizer's chat template rewrites the prompt once an answer follows: task.chat=never")
        return given, whole[len(given) :]

    def encode(self, rows: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) a row; a pair without completion has none."""
        texts = [self.texts(p) for p in rows]
        given = self.processor([t for t, _ in texts], add_special_tokens=not self.chat)["input_ids"]
        wanted = self.processor([t for _, t in texts], add_special_tokens=False)["input_ids"]
        found = []
        for pair, prompt, completion in zip(rows, given, wanted, strict=True):
            while prompt and not self.chat and prompt[-1] == self.processor.eos_token_id:
                prompt = prompt[:-1]  # some tokenizers end every text
            if not prompt:
                raise UserError(f"{pair.place}: the prompt is empty")
            found.append((prompt, self._ended(completion) if pair.completion else []))
        return found

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.processor.eos_token_id
        return ids[: len(ids) - ids[::-1].index(end)] if end in ids else [*ids, end]

    def describe(self) -> dict[str, Any]:
        """For the record: whether the template was used, and its fingerprint."""
        template = self.processor.chat_template if self.chat else None
        digest = hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else None
        return {"chat": self.chat, "template": digest, "system": self.system}

