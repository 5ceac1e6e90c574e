"""Rows of a source under class names: splits, fingerprint, loss and scores. text.py and image.py say what a row holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, List, Optional  # noqa: UP035  OmegaConf's spelling

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..registry import nearest
from . import SPLITS, labels, metrics
from .reading import Raw
from .splitting import Drawn


class Classification(Drawn):
    """Classes are known by name. Their order is the data's own, else that of `labels`, else sorted over the source's
    training split."""

    known_metrics: ClassVar[dict[str, Callable]] = metrics.CLASSES | metrics.PROBABILITIES
    labels: list[str]
    inputs: dict[str, list[Any]]  # split -> what the rows hold beside their targets, as read() gives it

    @dataclass
    class Config(Drawn.Config):
        """label: the column of classes. labels: the classes in order, where the source only numbers them. Parts of a
        split are stratified. classes: rows of these alone, in this order. part: `2/3` is the second of three equal parts
        of every split, which share no row."""

        label: str = "label"
        labels: List[str] = field(default_factory=list)  # noqa: UP006
        classes: Optional[List[str]] = None  # noqa: UP006, UP045
        part: str = ""
        primary: str = "accuracy"
        metrics: List[str] = field(default_factory=lambda: ["accuracy", "macro_f1"])  # noqa: UP006

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.primary not in self.metrics:
                raise UserError(f"task.primary={self.primary} is not among task.metrics={self.metrics}")
            if self.classes is not None and not 2 <= len(set(self.classes)) == len(self.classes):
                raise UserError(f"task.classes={self.classes}: name two or more, each once")
            if self.part:
                cut(self.part)

    def __init__(self, config: Any):
        super().__init__(config)
        for name in config.metrics:
            metrics.metric(name, self.known_metrics)
        if config.primary in metrics.PROBABILITIES:
            raise UserError(f"task.primary={config.primary} is an error, smaller where it is better: judge by another metric")
        self.primary = config.primary

    def read(self) -> dict[str, Raw]:
        """The source's own splits."""
        raise NotImplementedError

    def content(self, row: Any) -> Any:
        """What of a row's input the fingerprint covers, fit for JSON."""
        return row

    def shown(self, split: str, inputs: list[Any]) -> list[Any]:
        """The inputs of one of our splits as the model gets to see them."""
        return inputs

    def load(self) -> None:
        self.raw = self.place(self.read())
        numbers = self.numbers(self.raw["train"], self.raw)
        kept = {s: self.kept(n) for s, n in numbers.items()}
        rows = self.divide({s: self.strata(n[kept[s]]) for s, n in numbers.items()})
        rows = {s: kept[o][rows[s]] for s, o in self.source_split.items()}
        if (chosen := self.config.classes) is not None:
            place = np.array([chosen.index(n) if n in chosen else -1 for n in self.labels])
            numbers, self.labels = {s: place[n] for s, n in numbers.items()}, list(chosen)
        self.inputs = {s: self.shown(s, [self.raw[o].inputs[i] for i in rows[s]]) for s, o in self.source_split.items()}
        self.targets = {s: numbers[o][rows[s]].tolist() for s, o in self.source_split.items()}
        pairs = {s: zip(self.inputs[s], self.targets[s], strict=True) for s in SPLITS}
        self.digest([[s, self.content(row), self.told(n)] for s in SPLITS for row, n in pairs[s]])

    def numbers(self, train: Raw, used: dict[str, Raw]) -> dict[str, np.ndarray]:
        """Each row's target, a source split; sets `labels`."""
        given = list(self.config.labels)
        self.labels = labels.names(train, given, self.whole_source)
        if "f1" in self.config.metrics and len(self.labels) != 2:
            raise UserError(f"f1 is for two classes, these are {len(self.labels)}: task.metrics=[accuracy,macro_f1]")
        return {s: labels.numbers(r, self.labels, given) for s, r in used.items()}

    def kept(self, targets: np.ndarray) -> np.ndarray:
        """The rows of a source split that `classes` and `part` leave, in order. Raises UserError for an unknown class."""
        c, rows = self.config, np.arange(len(targets))
        if c.classes is not None:
            if unknown := [n for n in c.classes if n not in self.labels]:
                raise UserError(f"task.classes: no class {unknown[0]!r}; {nearest(unknown[0], self.labels)}")
            rows = rows[np.isin(targets, [self.labels.index(n) for n in c.classes])]
        if c.part:
            which, of = cut(c.part)
            strata = self.strata(targets[rows])
            order = np.random.default_rng(c.split_seed).permutation(len(rows))
            ranked = order[np.argsort(strata[order], kind="stable")]  # every stratum in one go, shuffled within
            rows = rows[np.sort(ranked[which - 1 :: of])]
        return rows

    def told(self, target: Any) -> Any:
        """A target for the fingerprint: a class by its name."""
        return self.labels[target]

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """What every drawn part holds in proportion."""
        return targets

    def head(self) -> dict[str, Any]:
        by_number = dict(enumerate(self.labels))
        return {"num_labels": len(self.labels), "id2label": by_number, "label2id": {n: i for i, n in by_number.items()}}

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

    def average(self, draws: list[list[Any]]) -> tuple[list[Any], float]:
        """Logarithms of the mean probabilities; the standard deviation over draws of the probability of the class that
        they predict, mean over rows."""
        p = metrics.probabilities(np.asarray(draws, np.float64))
        mean = p.mean(0)
        chosen = mean.argmax(-1)
        spread = np.take_along_axis(p, chosen[None, :, None], -1).std(0).mean()
        return np.log(np.maximum(mean, np.finfo(np.float64).tiny)).tolist(), float(spread)

    def calibration(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        return metrics.calibration(predictions, references)

    def given(self) -> dict[str, list[Any]]:
        return self.inputs

    def describe(self) -> dict[str, Any]:
        return super().describe() | self.describe_targets()

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


def cut(part: str) -> tuple[int, int]:
    """'2/3' -> (2, 3). Raises UserError for what is no part of a whole."""
    which, _, of = part.partition("/")
    if not (which.isdecimal() and of.isdecimal() and 1 <= int(which) <= int(of)):
        raise UserError(f"task.part={part}: the second of three is 2/3")
    return int(which), int(of)
