"""Adapters of lower ranks that an adapter holds: tried without a trace, and the curve of their scores."""

import pytest
import torch
from runs import configured
from support import Net, Regression, adamw, attached, close, same, train

from lorafactory import course, run
from lorafactory.evaluate import aurac


def test_a_change_that_is_tried_leaves_no_trace():
    """Neither of replaced tensors nor of what was written into one, nor in the optimiser."""
    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    adapted = attached("lora", base, data)
    optimizer = adapted.optimizer(adamw, 8)
    train(adapted, data, optimizer, steps=4)
    pairs = [low for _, low in adapted.adapter.low_ranks()]
    x, params, before = torch.randn(3, 24), list(adapted.adapter.parameters()), adapted.adapter.state_dict()
    before = {n: t.clone() for n, t in before.items()}
    y = adapted(x)

    def cut():
        for low in pairs:
            low.scale.mul_(3)
            low.A.mul_(2)
            low.keep(torch.tensor([1]))

    with adapted.adapter.tried(cut):
        assert all(low.rank == 1 for low in pairs) and not close(adapted(x), y)
    with pytest.raises(ZeroDivisionError), adapted.adapter.tried(lambda: cut() or 1 / 0):
        pass
    assert same(adapted.adapter.state_dict(), before) and torch.equal(adapted(x), y)
    assert all(a is b for a, b in zip(adapted.adapter.parameters(), params, strict=True))
    train(adapted, data, optimizer, steps=8, start=4)
    assert not torch.equal(adapted(x), y) and adapted.adapter.truncations() == {}


def test_the_area_by_hand():
    """Ranks 1, 2, 4, 8 with 0.2, 0.4, 0.6, 0.8: linear in log2 r, so its log area is the middle; over r the trapezoids
    are 0.3, 2 x 0.5 and 4 x 0.7, of a range of 7."""
    found = aurac({8: 0.8, 1: 0.2, 2: 0.4, 4: 0.6})
    assert found["aurac_log"] == pytest.approx(0.5)
    assert found["aurac_linear"] == pytest.approx((0.3 + 1.0 + 2.8) / 7)
    assert aurac({1: 0.7, 5: 0.7, 6: 0.7}) == pytest.approx({"aurac_linear": 0.7, "aurac_log": 0.7})
    assert aurac({4: 0.3}) == {"aurac_linear": 0.3, "aurac_log": 0.3}
    unknown = aurac({1: None, 2: 0.5})
    assert unknown["aurac_log"] is None and "no score" in unknown["aurac_log_undefined"]


PART = "{task: toy, train_size: 24, selection_size: 12, test_size: 12}"
STAGES = f"{PART[:-1]}, classes: [red, blue]}}, {PART}, {PART}"
SEQUENCE = ["task=sequence", f"task.stages=[{STAGES}]", "variant.rank=4", "train.steps=2", "train.batch_size=8"]


def scored(tmp_path, *options):
    return run.run(configured(*SEQUENCE, *options, f"results.folder={tmp_path}")).record["metrics"]


def test_a_sequence_scores_each_truncation_after_every_stage(tmp_path, monkeypatch):
    """Where the score of an adapter is its rank, that of a truncation is its rank, of whatever task."""

    def rank(adapted, task, *_):
        return {task.primary: float(next(iter(adapted.adapter.low_ranks()))[1].rank)}, []

    monkeypatch.setattr(course, "score", rank)
    found = scored(tmp_path, "variant=dylora")
    for r in (1, 2, 4):
        told = found["truncations"][str(r)]["test"]
        assert told["matrix"] == [[r, r, None], [r, r, r], [r, r, r]] and told["before"] == [4, 4, 4], "untrained it is the whole"
    assert found["test"]["matrix"][-1] == [4, 4, 4]
    assert found["test"]["aurac_linear"] == pytest.approx((1.5 + 2 * 3) / 3) and found["test"]["aurac_log"] == pytest.approx(2.25)


def test_the_truncation_of_all_ranks_is_the_whole(tmp_path):
    found = scored(tmp_path, "variant=matryoshka_lora", "train.lr=1e-2", "variant.budget.scored=[1, 4]")
    for split in ("selection", "test"):
        whole = {k: v for k, v in found[split].items() if not k.startswith("aurac")}
        assert list(found["truncations"]) == ["1", "4"] and found["truncations"]["4"][split] == whole


def test_a_rank_that_is_cut_for_good_has_no_score_of_a_sequence(tmp_path):
    assert list(scored(tmp_path, "variant=dylora", "variant.budget.keep=2")["truncations"]) == ["1", "2"]
