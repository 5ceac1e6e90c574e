"""Classification metrics. An undefined value is None with its reason, never 0 and never NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UserError
from ..registry import nearest


class Undefined(Exception):
    """The metric has no value for these predictions; the message says why."""


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean(predicted == true))


def f1(predicted: np.ndarray, true: np.ndarray, positive: int = 1) -> float:
    """2 TP / (2 TP + FP + FN) of one class: GLUE's F1, of class 1."""
    hits = np.sum((predicted == positive) & (true == positive))
    total = np.sum(predicted == positive) + np.sum(true == positive)
    if total == 0:
        raise Undefined(f"class {positive} is neither predicted nor present")
    return float(2 * hits / total)


def macro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """The plain mean of every class's F1, over the classes that are predicted or present."""
    return float(np.mean([f1(predicted, true, c) for c in np.union1d(predicted, true)]))


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004): cov(p, t) / sqrt(cov(p, p) cov(t, t)) of the
    one-hot rows."""
    for what, values in (("predictions", predicted), ("references", true)):
        if len(np.unique(values)) < 2:
            raise Undefined(f"all {what} are class {values[0]}")
    classes = np.union1d(predicted, true)
    p, t = predicted[:, None] == classes, true[:, None] == classes
    p, t = p - p.mean(0), t - t.mean(0)
    return float((p * t).sum() / np.sqrt((p * p).sum() * (t * t).sum()))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    f.__name__: f for f in (accuracy, f1, macro_f1, matthews)
}


def metric(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    if name not in METRICS:
        raise UserError(f"no metric {name!r}; {nearest(name, METRICS)}")
    return METRICS[name]


def compute(names: list[str], logits: list[list[float]], references: list[int]) -> dict[str, Any]:
    """Every named metric of the largest logit's class; see Task.metrics for the shape of the answer."""
    scores, true = np.asarray(logits, np.float64), np.asarray(references)
    if scores.ndim != 2 or len(scores) != len(true) or not len(true):
        raise ValueError(f"{scores.shape} predictions for {len(true)} references")
    bad = int((~np.isfinite(scores)).any(1).sum())
    predicted = scores.argmax(1)
    found: dict[str, Any] = {}
    for name in names:
        try:
            if bad:
                raise Undefined(f"{bad} of {len(scores)} predictions are not finite")
            found[name] = metric(name)(predicted, true)
        except Undefined as e:
            found |= {name: None, f"{name}_undefined": str(e)}
    return found | {"constant_prediction": not bad and len(np.unique(predicted)) == 1}


def as_evaluate(name: str) -> Any:
    """The metric as an evaluate.Metric over class numbers: no hub, no files; None where it is undefined.

    Runs call compute(): importing evaluate takes 2 seconds."""
    import datasets
    import evaluate

    function = metric(name)

    class Local(evaluate.Metric):
        def _info(self) -> Any:
            columns = datasets.Features({c: datasets.Value("int64") for c in ("predictions", "references")})
            about = function.__doc__ or function.__name__
            return evaluate.MetricInfo(description=about, citation="", features=columns)

        def _compute(self, predictions: Any, references: Any) -> dict[str, float | None]:
            try:
                return {name: function(np.asarray(predictions), np.asarray(references))}
            except Undefined:
                return {name: None}

    return Local(keep_in_memory=True)
