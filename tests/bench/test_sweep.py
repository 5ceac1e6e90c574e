"""The sweep benchmark's page and sums. No test measures time."""

import sys
from pathlib import Path

import pytest

from lorafactory import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import sweep  # noqa: E402


def test_the_page_says_runs_an_hour_and_what_is_lost():
    side = {"wall": 100.0, "train": 60.0, "evaluate": 30.0}
    found = {
        "command": "python scripts/bench/sweep.py", "settings": {"runs": 20, "steps": 40, "load_before": 0.5},
        "environment": {"cpu": "a processor", "threads": 2, "commit": "abc", "dirty": True, "source": "123"},
        "sides": {"ours": side, "theirs": {"wall": 200.0}},
    }  # fmt: skip
    lines = sweep.page(found).splitlines()
    assert "| ours | 720 | 100.0 | 10% |" in lines
    assert "| theirs | 360 | 200.0 |  |" in lines
    assert lines[-1] == "- commit abc and uncommitted changes, code 123"


def test_runs_in_processes_of_their_own_are_summed(monkeypatch):
    calls = []
    monkeypatch.setattr(sweep, "ours", lambda seeds, steps: calls.append(seeds) or {"wall": float(len(seeds)), "train": 0.5})
    monkeypatch.setattr(sweep, "theirs", lambda seeds, steps: calls.append(seeds) or {"wall": 2.0})
    found = sweep.measure(3, 1)
    assert [s["wall"] for s in found.values()] == [3.0, 3.0, 2.0, 6.0]
    assert calls == [[0, 1, 2], [0], [1], [2], [0, 1, 2], [0], [1], [2]]


def test_a_script_that_fails_is_named():
    with pytest.raises(UserError, match="-c raise SystemExit.* failed: why"):
        sweep.seconds("-c", "raise SystemExit('noise\\nwhy')")
