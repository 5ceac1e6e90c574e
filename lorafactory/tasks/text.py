"""Text classification on any source with one or two text columns and a label column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, List  # noqa: UP035  OmegaConf's spelling

from torch import Tensor

from ..errors import UserError
from . import SPLITS, register_task, tokens
from .classification import Classification
from .reading import Raw, read


@register_task("text")
class Text(Classification):
    """A text, or a pair of them, under class names."""

    @dataclass
    class Config(Classification.Config):
        """text: one or two columns. max_length: tokens."""

        kind: str = "text"
        text: List[str] = field(default_factory=lambda: ["text"])  # noqa: UP006
        max_length: int = 128

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 1 <= len(self.text) <= 2:
                raise UserError(f"task.text={self.text}: name one or two columns")

    def __init__(self, config: Any):
        super().__init__(config)
        self.cut: dict[str, int] = {}

    def read(self) -> dict[str, Raw]:
        c = self.config
        return read(c.source, c.subset, c.revision, list(c.text), c.label)

    @property
    def texts(self) -> dict[str, list[tuple[str, ...]]]:
        return self.inputs

    def prepare(self, processor: Any) -> None:
        longest, limit = self.config.max_length, processor.model_max_length
        shortest = 1 + processor.num_special_tokens_to_add(pair=len(self.config.text) == 2)
        if not shortest <= longest <= limit:
            raise UserError(f"task.max_length={longest}: this model takes {shortest} to {limit} tokens")
        self.processor = processor
        key = tokens.key(processor, self.fingerprint, longest)
        found = tokens.cached(key, lambda: tokens.tokenise(processor, self.texts, longest))
        rows = {s: tokens.rows(found, s, labels=self.targets[s]) for s in SPLITS}
        self.splits = {**rows}
        self.cut = {s: sum(n >= longest for n in r.lengths()) for s, r in rows.items()}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return tokens.pad(rows, self.processor)

    def describe(self) -> dict[str, Any]:
        """recoded: files that were not UTF-8. cut: rows as long as max_length, once prepared."""
        recoded = sum(len(r.recoded) for r in self.raw.values())
        return super().describe() | {"recoded": recoded, "cut": self.cut}
