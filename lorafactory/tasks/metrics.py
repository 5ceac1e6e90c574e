"""Metrics of classes and of numbers. An undefined value is None with its reason, never 0 and never NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import comb
from typing import Any

import numpy as np

from ..errors import UserError


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


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Linear correlation."""
    for what, values in (("predictions", predicted), ("references", true)):
        if np.ptp(values) == 0:
            raise Undefined(f"all {what} are {values[0]}")
    return float(np.corrcoef(predicted, true)[0, 1])


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """The linear correlation of the ranks; equal values share their mean rank."""
    from scipy.stats import rankdata

    return pearson(rankdata(predicted), rankdata(true))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """How likely one of k programs drawn from the `samples` written for a problem is correct, without bias:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1). In whole numbers until the last division,
    so exact for any n."""
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} of {samples} programs a problem: k must be from 1 to {samples}; sample at least {k}")
    if not 0 <= correct <= samples:
        raise ValueError(f"{correct} of {samples} are correct")
    draws = comb(samples, k)
    return (draws - comb(samples - correct, k)) / draws


def probabilities(logits: np.ndarray) -> np.ndarray:
    """softmax over the last dimension."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ece(p: np.ndarray, true: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): |accuracy - confidence| in 15 bins of the largest
    probability, of equal width, by how many rows each holds. Smaller is better."""
    confidence, hit = p.max(1), p.argmax(1) == true
    place = np.minimum(np.ceil(confidence * bins).astype(int) - 1, bins - 1)
    off = [abs((hit[place == b] - confidence[place == b]).sum()) for b in np.unique(place)]
    return float(sum(off) / len(true))


def brier(p: np.ndarray, true: np.ndarray) -> float:
    """Brier's score: the squared distance of the probabilities from the one-hot truth, 0 to 2. Smaller is better."""
    return float(np.square(p - np.eye(p.shape[1])[true]).sum(1).mean())


Metric = Callable[[np.ndarray, np.ndarray], float]
CLASSES: dict[str, Metric] = {f.__name__: f for f in (accuracy, f1, macro_f1, matthews)}
PROBABILITIES: dict[str, Metric] = {f.__name__: f for f in (ece, brier)}
NUMBERS: dict[str, Metric] = {f.__name__: f for f in (pearson, spearman)}


def metric(name: str, among: dict[str, Metric]) -> Metric:
    if name not in among:
        raise UserError(f"no metric {name!r} for this kind of task; it has {', '.join(among)}")
    return among[name]


def classify(names: list[str], logits: list[list[float]], references: list[int]) -> dict[str, Any]:
    """Every named metric of the largest logit's class, or of all of them; see Task.metrics for the shape of the answer."""
    chosen = [n for n in names if n not in PROBABILITIES]
    found = _compute(chosen, CLASSES, logits, references, lambda scores: scores.argmax(1))
    return found | calibration(logits, references, [n for n in names if n in PROBABILITIES])


def calibration(logits: list[list[float]], references: list[int], names: Iterable[str] = PROBABILITIES) -> dict[str, Any]:
    """How well the probabilities hold, by the named metrics of PROBABILITIES."""
    found = _compute(list(names), PROBABILITIES, logits, references, probabilities)
    del found["constant_prediction"]  # of probabilities, which says nothing
    return found


def regress(names: list[str], predictions: list[list[float]], references: list[float]) -> dict[str, Any]:
    """Every named metric of the rows' single numbers."""
    return _compute(names, NUMBERS, predictions, references, lambda scores: scores[:, 0])


def _compute(names: list[str], among: dict[str, Metric], raw: list, references: list, answer: Callable) -> dict[str, Any]:
    scores, true = np.asarray(raw, np.float64), np.asarray(references)
    if scores.ndim != 2 or len(scores) != len(true) or not len(true):
        raise ValueError(f"{scores.shape} predictions for {len(true)} references")
    bad = int((~np.isfinite(scores)).any(1).sum())
    predicted = answer(scores)
    found: dict[str, Any] = {}
    for name in names:
        try:
            if bad:
                raise Undefined(f"{bad} of {len(scores)} predictions are not finite")
            found[name] = metric(name, among)(predicted, true)
        except Undefined as e:
            found |= {name: None, f"{name}_undefined": str(e)}
    return found | {"constant_prediction": not bad and len(np.unique(predicted)) == 1}


def as_evaluate(name: str) -> Any:
    """The metric as an evaluate.Metric over class numbers or real ones: no hub, no files; None where it is undefined.

    Runs do without: importing evaluate takes 2 seconds."""
    import datasets
    import evaluate

    function = metric(name, CLASSES | NUMBERS)
    dtype = "int64" if name in CLASSES else "float64"

    class Local(evaluate.Metric):
        def _info(self) -> Any:
            columns = datasets.Features({c: datasets.Value(dtype) for c in ("predictions", "references")})
            about = function.__doc__ or function.__name__
            return evaluate.MetricInfo(description=about, citation="", features=columns)

        def _compute(self, predictions: Any, references: Any) -> dict[str, float | None]:
            try:
                return {name: function(np.asarray(predictions), np.asarray(references))}
            except Undefined:
                return {name: None}

    return Local(keep_in_memory=True)
