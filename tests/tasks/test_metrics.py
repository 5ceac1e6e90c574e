"""Metrics against scikit-learn's, and what happens where they have no value (B58)."""

from itertools import combinations

import numpy as np
import pytest
from samples import refused

from lorafactory.tasks import metrics

sklearn = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn to compare with")
THEIRS = {
    "accuracy": lambda p, t: sklearn.accuracy_score(t, p),
    "f1": lambda p, t: sklearn.f1_score(t, p),
    "macro_f1": lambda p, t: sklearn.f1_score(t, p, average="macro"),
    "matthews": lambda p, t: sklearn.matthews_corrcoef(t, p),
}


def logits(predicted, classes):
    return (np.eye(classes)[predicted] + np.linspace(0, 0.1, classes)).tolist()


@pytest.mark.parametrize("name", metrics.CLASSES)
@pytest.mark.parametrize("classes", [2, 5])
def test_equal_to_sklearn(name, classes):
    if name == "f1" and classes > 2:
        pytest.skip("F1 of class 1 is for two classes")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        true = rng.choice(classes, 40, p=rng.dirichlet(np.ones(classes)))
        predicted = np.where(rng.random(40) < 0.5, true, rng.integers(classes, size=40))
        if len(set(true)) > 1 and len(set(predicted)) > 1:
            found = metrics.classify([name], logits(predicted, classes), true.tolist())
            assert found[name] == pytest.approx(THEIRS[name](predicted, true), abs=1e-12)
            assert found["constant_prediction"] is False


def test_a_constant_prediction_is_said_and_its_correlation_is_undefined():
    found = metrics.classify(["matthews", "f1", "accuracy"], logits([1] * 6, 2), [1, 1, 1, 1, 0, 0])
    assert found["matthews"] is None and found["matthews_undefined"] == "all predictions are class 1"
    assert found["constant_prediction"] is True and found["f1"] == pytest.approx(0.8)


def test_f1_without_positives_is_undefined_not_zero():
    found = metrics.classify(["f1"], logits([0, 0], 2), [0, 0])
    assert found["f1"] is None and "class 1" in found["f1_undefined"]


def test_predictions_that_are_not_finite_have_no_score():
    found = metrics.classify(["accuracy"], [[float("nan"), 0.0], [0.0, 1.0]], [0, 1])
    assert found["accuracy"] is None and found["accuracy_undefined"] == "1 of 2 predictions are not finite"


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="references"):
        metrics.classify(["accuracy"], [[0.0, 1.0]], [0, 1])


def test_unknown_metric_names_the_nearest():
    refused(lambda: metrics.metric("acuracy", metrics.CLASSES), "acuracy", "accuracy")


def test_evaluate_metrics_need_no_hub():
    pytest.importorskip("evaluate", reason="needs evaluate")
    predicted, true = [0, 1, 1, 0, 1], [0, 1, 0, 0, 1]
    for name in metrics.CLASSES:
        ours = metrics.classify([name], logits(predicted, 2), true)[name]
        assert metrics.as_evaluate(name).compute(predictions=predicted, references=true) == {name: pytest.approx(ours)}
    assert metrics.as_evaluate("matthews").compute(predictions=[1, 1], references=[0, 1]) == {"matthews": None}


def test_correlations_are_scipys_and_undefined_where_constant():
    from scipy import stats

    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, 50) / 1.0
    predicted = true + rng.normal(size=50)
    found = metrics.regress(["pearson", "spearman"], predicted[:, None].tolist(), true.tolist())
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, true).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, true).statistic)
    assert not found["constant_prediction"]
    flat = metrics.regress(["pearson", "spearman"], [[0.5]] * 50, true.tolist())
    assert flat["pearson"] is flat["spearman"] is None and flat["constant_prediction"]
    assert "0.5" in flat["pearson_undefined"]
    assert metrics.regress(["pearson"], [[float("nan")], [1.0]], [0.0, 1.0])["pearson"] is None
    pytest.importorskip("evaluate", reason="needs evaluate")
    ours = metrics.as_evaluate("pearson").compute(predictions=predicted.tolist(), references=true.tolist())
    assert ours == {"pearson": pytest.approx(found["pearson"])}


def test_pass_at_k_on_hand_numbers():
    assert metrics.pass_at_k(5, 2, 1) == 2 / 5
    assert metrics.pass_at_k(5, 2, 2) == 1 - 3 / 10  # of 10 pairs 3 hold none of the two
    assert metrics.pass_at_k(5, 2, 4) == 1  # only three are wrong
    assert metrics.pass_at_k(1, 0, 1) == 0 and metrics.pass_at_k(1, 1, 1) == 1
    assert metrics.pass_at_k(200, 1, 100) == 0.5  # numbers of 59 digits
    assert metrics.pass_at_k(10**5, 1, 1) == 1e-5


def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_one():
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                hits = [min(draw) < correct for draw in combinations(range(n), k)]
                assert metrics.pass_at_k(n, correct, k) == pytest.approx(np.mean(hits), abs=1e-15)


def test_pass_at_k_needs_k_samples():
    refused(lambda: metrics.pass_at_k(5, 2, 6), "pass@6", "5 programs", "sample at least 6")
    refused(lambda: metrics.pass_at_k(5, 2, 0), "pass@0")
    with pytest.raises(ValueError, match="6 of 5"):
        metrics.pass_at_k(5, 6, 1)


def test_probabilities_by_hand():
    """Four rows said with 3/4: three right is calibrated; all wrong is off by 3/4. Brier: 2 (1/4)^2 or 2 (3/4)^2 a row."""
    rows = np.log([[0.75, 0.25]] * 4).tolist()
    right, wrong = metrics.calibration(rows, [0, 0, 0, 1]), metrics.calibration(rows, [1, 1, 1, 1])
    assert right == {"ece": pytest.approx(0), "brier": pytest.approx((3 * 0.125 + 1.125) / 4)}
    assert wrong == {"ece": pytest.approx(0.75), "brier": pytest.approx(1.125)}
    named = metrics.classify(["accuracy", "brier"], rows, [0, 0, 0, 1])
    assert named == {"accuracy": 0.75, "constant_prediction": True, "brier": right["brier"]}


def test_calibration_is_weighted_by_rows_and_brier_is_sklearns():
    rng = np.random.default_rng(0)
    logits_, true = rng.normal(size=(200, 2)), rng.integers(2, size=200)
    p = metrics.probabilities(logits_)
    assert metrics.brier(p, true) == pytest.approx(2 * sklearn.brier_score_loss(true, p[:, 1]))
    edges, off = np.linspace(0, 1, 16), 0.0
    for low, high in zip(edges, edges[1:], strict=False):
        held = (p.max(1) > low) & (p.max(1) <= high)
        if held.any():
            off += held.mean() * abs((p.argmax(1) == true)[held].mean() - p.max(1)[held].mean())
    assert metrics.ece(p, true) == pytest.approx(off)
    assert metrics.ece(np.eye(2)[true], true) == metrics.brier(np.eye(2)[true], true) == 0.0
