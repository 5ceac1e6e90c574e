"""A number for a text or a pair of texts: GLUE's STS-B, and any source like it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, List  # noqa: UP035  OmegaConf's spelling

import numpy as np
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import SPLITS, metrics, register_task
from .reading import Raw
from .text import Text


@register_task("regression")
class Regression(Text):
    """One output, squared error. Parts of a split are drawn so that each rounded score has its share."""

    known_metrics = metrics.NUMBERS

    @dataclass
    class Config(Text.Config):
        """label: the column of numbers."""

        kind: str = "regression"
        primary: str = "pearson"
        metrics: List[str] = field(default_factory=lambda: ["pearson", "spearman"])  # noqa: UP006

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.labels:
                raise UserError(f"task.labels={list(self.labels)}: a regression has no classes")

    def numbers(self, train: Raw, used: dict[str, Raw]) -> dict[str, np.ndarray]:
        self.labels = []
        return {s: np.array([_number(v, p) for v, p in zip(r.labels, r.places, strict=True)]) for s, r in used.items()}

    def told(self, target: Any) -> Any:
        return float(target)

    def strata(self, targets: np.ndarray) -> np.ndarray:
        return np.round(targets)

    def head(self) -> dict[str, Any]:
        return {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(self._logits(model, batch).squeeze(-1), batch["labels"].float(), reduction="sum")

    def metrics(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        return metrics.regress(list(self.config.metrics), predictions, references)

    def average(self, draws: list[list[Any]]) -> tuple[list[Any], float]:
        """Means, and the standard deviation over draws, mean over rows."""
        found = np.asarray(draws, np.float64)
        return found.mean(0).tolist(), float(found.std(0).mean())

    def calibration(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        return {}

    def describe_targets(self) -> dict[str, Any]:
        return {"range": {s: [min(self.targets[s]), max(self.targets[s])] for s in SPLITS}}


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{place}: {value!r} is not a number to learn")
    return float(value)
