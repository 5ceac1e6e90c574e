"""The benchmark runs, counts alike on both sides, and shows a variant that fails. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "bench" / "overhead.py")


def test_it_writes_a_page_and_its_numbers(tmp_path):
    pytest.importorskip("peft")
    options = ["--model", "tiny", "--rounds", "2", "--rank", "4", "--out", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, SCRIPT, *options, "--variants", "dora,bitfit,no_such_variant"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr  # one variant failed, and it says so
    made = json.loads((tmp_path / "overhead.json").read_text())
    rows = {row["variant"]: row for row in made["rows"]}
    assert "no variant 'no_such_variant'" in rows["no_such_variant"]["error"]
    for name in ("dora", "bitfit"):
        assert {w: len(s) for w, s in rows[name]["seconds"].items()} == {"bare": 2, "ours": 2, "theirs": 2}
        assert rows[name]["trainable"]["ours"] == rows[name]["trainable"]["theirs"] > rows[name]["trainable"]["bare"]
        assert rows[name]["bytes"].keys() == {"bare", "ours", "theirs"}
    page = (tmp_path / "overhead.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert "no_such_variant" in page and made["environment"]["cpu"] in page
