"""Text classification on any source with one or two text columns and a label column."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, List  # noqa: UP035  OmegaConf's spelling

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import SPLITS, Task, labels, metrics, register_task, tokens
from .reading import Raw, read
from .splitting import divide, overlaps


@register_task("text")
class Text(Task):
    """Classes are known by name. Their order is the data's own, else that of `labels`, else sorted over the source's
    training split."""

    known_metrics: ClassVar[dict[str, Callable]] = metrics.CLASSES
    labels: list[str]

    @dataclass
    class Config(Task.Config):
        """subset: the source's configuration (GLUE: cola). text: one or two columns. labels: the classes in order,
        where the source only numbers them. test_split, selection_split: a split of the source, or `train`: a seeded
        stratified part of it, of *_size rows, or *_share of all where that is 0. max_length: tokens."""

        kind: str = "text"
        subset: str = ""
        text: List[str] = field(default_factory=lambda: ["text"])  # noqa: UP006
        label: str = "label"
        labels: List[str] = field(default_factory=list)  # noqa: UP006
        test_split: str = "test"
        selection_split: str = "train"
        test_share: float = 0.2
        selection_share: float = 0.1
        max_length: int = 128
        primary: str = "accuracy"
        metrics: List[str] = field(default_factory=lambda: ["accuracy", "macro_f1"])  # noqa: UP006

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 1 <= len(self.text) <= 2:
                raise UserError(f"task.text={self.text}: name one or two columns")
            if self.primary not in self.metrics:
                raise UserError(f"task.primary={self.primary} is not among task.metrics={self.metrics}")
            for option in ("test_share", "selection_share"):
                if not 0 < getattr(self, option) < 1:
                    raise UserError(f"task.{option}={getattr(self, option)}: give a part of 1, as 0.2")
            if self.selection_split == self.test_split != "train":
                raise UserError(f"selection and test are both {self.test_split}: selection must not see scored rows")

    def __init__(self, config: Any):
        super().__init__(config)
        for name in config.metrics:
            metrics.metric(name, self.known_metrics)
        self.primary = config.primary
        self.cut: dict[str, int] = {}

    def read(self) -> dict[str, Raw]:
        """The source's own splits."""
        c = self.config
        return read(c.source, c.subset, c.revision, list(c.text), c.label)

    def load(self) -> None:
        c, raw = self.config, self.read()
        self.source_split = {"train": "train", "selection": c.selection_split, "test": c.test_split}
        for ours, theirs in self.source_split.items():
            if theirs not in raw:
                hint = f"; task.{ours}_split=train draws a part of train" if ours != "train" else ""
                raise UserError(f"{self._source} has no {theirs} split for {ours}; it has {', '.join(raw)}{hint}")
        used = {s: raw[s] for s in dict.fromkeys(self.source_split.values())}
        numbers = self.numbers(raw["train"], used)
        strata = {s: self.strata(n) for s, n in numbers.items()}
        rows = divide(strata, self.source_split, c, self._source)
        self.texts = {s: [used[o].texts[i] for i in rows[s]] for s, o in self.source_split.items()}
        self.targets = {s: numbers[o][rows[s]].tolist() for s, o in self.source_split.items()}
        self.recoded = sum(len(r.recoded) for r in used.values())
        content = [[s, t, self.told(n)] for s in SPLITS for t, n in zip(self.texts[s], self.targets[s], strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def numbers(self, train: Raw, used: dict[str, Raw]) -> dict[str, np.ndarray]:
        """Each row's target, a source split; sets `labels`."""
        given = list(self.config.labels)
        self.labels = labels.names(train, given, self._source)
        if "f1" in self.config.metrics and len(self.labels) != 2:
            raise UserError(f"f1 is for two classes, these are {len(self.labels)}: task.metrics=[accuracy,macro_f1]")
        return {s: labels.numbers(r, self.labels, given) for s, r in used.items()}

    def told(self, target: Any) -> Any:
        """A target for the fingerprint: a class by its name."""
        return self.labels[target]

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """What every drawn part holds in proportion."""
        return targets

    @property
    def _source(self) -> str:
        return "/".join(filter(None, (self.config.source, self.config.subset)))

    def head(self) -> dict[str, Any]:
        by_number = dict(enumerate(self.labels))
        return {"num_labels": len(self.labels), "id2label": by_number, "label2id": {n: i for i, n in by_number.items()}}

    def prepare(self, processor: Any) -> None:
        longest, limit = self.config.max_length, processor.model_max_length
        shortest = 1 + processor.num_special_tokens_to_add(pair=len(self.config.text) == 2)
        if not shortest <= longest <= limit:
            raise UserError(f"task.max_length={longest}: this model takes {shortest} to {limit} tokens")
        if processor.pad_token_id is None:
            raise UserError(
                "this tokenizer has no padding token, without which rows of different length cannot share a batch: "
                f"name one of its tokens, as model.pad_token='{processor.eos_token or processor.unk_token}'"
            )
        self.processor = processor
        key = tokens.key(processor, self.fingerprint, longest)
        found = tokens.cached(key, lambda: tokens.tokenise(processor, self.texts, longest))
        rows = {s: tokens.rows(found, s, labels=self.targets[s]) for s in SPLITS}
        self.splits = {**rows}
        self.cut = {s: sum(n >= longest for n in r.lengths()) for s, r in rows.items()}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return tokens.pad(rows, self.processor)

    def size(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**{n: t for n, t in batch.items() if n != "labels"}).logits.float()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self._logits(model, batch), batch["labels"], reduction="sum")

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[list[float]]:
        return self._logits(model, batch).tolist()

    def references(self, split: str) -> list[int]:
        return self.targets[split]

    def metrics(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        return metrics.classify(list(self.config.metrics), predictions, references)

    def describe(self) -> dict[str, Any]:
        """duplicates: rows whose text the other split holds, too. cut: rows as long as max_length, once prepared."""
        c = self.config
        return {
            "name": c.name,
            "kind": c.kind,
            "source": self._source,
            "revision": c.revision,
            "fingerprint": self.fingerprint,
            "sizes": {s: len(self.targets[s]) for s in SPLITS},
            "splits": self.source_split,
            "split_seed": c.split_seed,
            "duplicates": overlaps(self.texts),
            "recoded": self.recoded,
            "cut": self.cut,
            **self.describe_targets(),
        }

    def describe_targets(self) -> dict[str, Any]:
        """majority: the scores on test of answering the most frequent training class always."""
        most = Counter(self.targets["train"]).most_common(1)[0][0]
        always = np.eye(len(self.labels))[[most] * len(self.targets["test"])].tolist()
        missing = {s: [n for i, n in enumerate(self.labels) if i not in set(self.targets[s])] for s in SPLITS}
        return {
            "labels": self.labels,
            "missing_labels": {s: names for s, names in missing.items() if names},
            "majority": {"label": self.labels[most], **self.metrics(always, self.targets["test"])},
        }
