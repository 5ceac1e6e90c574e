"""The examples run from anywhere, offline, and what they print shows that saving, loading and merging lose nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

EXAMPLES = Path(__file__).resolve().parents[2] / "scripts" / "examples"


@pytest.fixture
def said(tmp_path):
    def run(name):
        ended = subprocess.run(
            [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0 and "Warning" not in ended.stderr, ended.stderr
        assert not list(tmp_path.iterdir()), "it leaves something behind"
        return ended.stdout

    return run


def test_every_example_is_run_here():
    assert {p.name for p in EXAMPLES.iterdir()} == {"plain_loop.py", "sft_loop.py", "trainer.py"}
    assert all(30 <= len(p.read_text().splitlines()) <= 65 for p in EXAMPLES.iterdir())


def test_plain_loop(said):
    out = said("plain_loop.py")
    end, loaded, disabled, merged = (float(re.search(rf"{w} +([\d.]+)", out)[1]) for w in ("end", "loaded", "disabled", "merged"))
    first = float(re.search(r"step +0 +loss ([\d.]+)", out)[1])
    assert end == loaded == merged < 0.5 * disabled and end < 0.5 * first


def test_trainer(said):
    out = said("trainer.py")
    assert "100% of the predictions agree" in out and int(re.search(r"accuracy (\d+)%", out)[1]) >= 90
    ranks = [int(r) for r in re.search(r"ranks \[(.*)\]", out)[1].split(",")]
    assert len(set(ranks)) > 1, "the budget did not fall"


def test_sft_loop(said):
    found = re.findall(r"(\d+) of 16 answers", said("sft_loop.py"))
    assert len(found) == 2 and found[0] == found[1] and int(found[0]) >= 12
