"""The benchmark's pieces run on the tiny model and its page is well-formed. No test measures time."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from lorafactory import UserError, describe, registry

SCRIPTS = str(Path(__file__).parents[2] / "scripts" / "bench")
pytest.importorskip("peft", reason="the benchmark compares with PEFT: pip install peft")
sys.path.insert(0, SCRIPTS)
import _measure  # noqa: E402
import _page  # noqa: E402
import _peft  # noqa: E402
import _sides  # noqa: E402
import overhead  # noqa: E402

registry.discover()


@pytest.fixture(scope="module")
def base():
    return describe.base_model("tiny")


@pytest.mark.parametrize("spelling", [s for s in _peft.COUNTERPARTS if s != "eva"])
def test_both_sides_train_as_many_numbers_in_the_same_layers(base, spelling):
    """AdaLoRA's ranks, DoRA's magnitudes, VeRA's vectors: a counterpart told otherwise would be another method."""
    rounds = 5
    ours, _ = _measure.started("ours", base, spelling, 4, rounds)
    theirs, _ = _measure.started("theirs", base, spelling, 4, rounds)
    assert ours.trainable == theirs.trainable
    for batch in _sides.batches(base)[:2]:
        ours.step(batch)
        theirs.step(batch)


def test_a_step_trains_what_it_counts(base):
    for side in ("bare", "norms", "ours", "dense", "theirs"):
        model = copy.deepcopy(base)
        made = _measure.make(side, model, "lora", 4, 4)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for batch in _sides.batches(model)[:2]:
            made.step(batch)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert made.trainable > 0
        assert (moved == set()) == (side in ("ours", "dense")), "ours holds its numbers, head included, beside the model"


@pytest.mark.parametrize("spelling", ["lora", "dora", "vera", "loha", "shira", "oft", "ia3"])
def test_the_dense_form_is_ours(base, spelling):
    """A step of each from one start ends at the same numbers."""
    torch.manual_seed(0)
    ends = []
    for side in ("ours", "dense"):
        model = copy.deepcopy(base)
        _measure.make(side, model, spelling, 4, 4).step(_sides.batches(model)[0])
        ends.append(logits(model))
    assert torch.allclose(*ends, atol=1e-5) and not torch.allclose(ends[0], logits(base), atol=1e-5)
    assert _measure.make("dense", copy.deepcopy(base), "molora", 4, 4) is None


@torch.no_grad()
def logits(model):
    return model.eval()(**_sides.batches(model)[0]).logits


def test_the_base_that_is_copied_stays_as_it_is(base):
    before = {n: t.clone() for n, t in base.state_dict().items()}
    side, seconds = _measure.started("ours", base, "full", 4, 5)
    side.step(_sides.batches(base)[0])
    assert seconds > 0
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_sides_take_turns():
    seen = []
    steps = {name: (lambda batch, name=name: seen.append(name)) for name in "abc"}
    seconds = _measure.alternate(steps, [{}], 30)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == 33 and {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) == 6, "every one follows every other"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 30, "b": 30, "c": 30}


def test_ratios_are_of_the_steps_of_one_round():
    slow_machine = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert overhead.ratios([2 * s for s in slow_machine], slow_machine) == {"median": 2.0, "low": 2.0, "high": 2.0}
    found = overhead.spread([float(k) for k in range(1, 12)])
    assert found == {"median": 6.0, "low": 2.0, "high": 10.0}


def test_default_variants_are_all_that_there_are():
    assert sorted(overhead.default_variants()) == sorted([*registry.names(), "dora+pissa"])


def test_a_whole_run_and_a_variant_that_fails(tmp_path, monkeypatch, capsys):
    def broken(model, config, names, total):
        raise ValueError("no such\nluck")

    monkeypatch.setitem(_peft.COUNTERPARTS, "bitfit", _peft.Counterpart("a broken one", "", broken))
    arguments = ["--model", "tiny", "--variants", "lora,bitfit,head_only", "--rank", "4", "--rounds", "5"]
    assert overhead.main([*arguments, "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "overhead_tiny.json").read_text())
    lora, bitfit, head_only = found["rows"]
    assert bitfit["error"] == "ValueError: no such luck" and "time" not in bitfit
    assert lora["memory"].keys() == {"bare", "theirs"} and lora["time"].keys() == {"bare", "norms", "theirs", "dense"}
    assert head_only["memory"].keys() == {"bare"} and head_only["time"].keys() == {"bare", "norms"}
    assert all(n > 0 for r in (lora, head_only) for n in r["peak_bytes"].values())
    assert {"commit", "packages", "cpu", "threads", "matrix_instructions"} <= found["environment"].keys()
    assert well_formed((tmp_path / "overhead_tiny.md").read_text())
    assert "- `bitfit`: ValueError: no such luck" in (tmp_path / "overhead_tiny.md").read_text()
    capsys.readouterr()
    arguments[3] += ",rslora"
    assert overhead.main([*arguments, "--out", str(tmp_path)]) == 1, "a row of before failed"
    assert "4/4 rslora" in (told := capsys.readouterr().err) and "lora\n" not in told.replace("rslora\n", "")
    assert json.loads((tmp_path / "overhead_tiny.json").read_text())["rows"][:3] == found["rows"], "it goes on"
    arguments[5] = "3"
    overhead.main([*arguments, "--out", str(tmp_path)])
    assert "1/4 lora" in capsys.readouterr().err, "other settings are another measurement"


def well_formed(text):
    """Every table has one width, and a row of dashes under its head."""
    tables, lines = [], text.split("\n")
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            tables += [] if before.startswith("|") else [[]]
            tables[-1].append(line.strip("|").split("|"))
    return tables and all(len({len(row) for row in t}) == 1 and set(t[1][0].strip()) == {"-"} for t in tables)


def test_the_page_says_where_ours_takes_more():
    def row(name, time, memory, **more):
        return {
            "variant": name,
            "counterpart": "theirs",
            "note": "",
            "time": {"theirs": time},
            "memory": {"theirs": memory},
            **more,
        }

    slow, even = {"median": 1.2, "low": 1.1, "high": 1.3}, {"median": 1.01, "low": 0.9, "high": 1.1}
    fast = {"median": 0.8, "low": 0.7, "high": 0.9}
    rows = [row("a", slow, 0.9, note="why"), row("b", even, 0.9), row("c", fast, 1.02), row("d", fast, 1.5)]
    assert _page._more(rows) == [
        "- `a`: 1.20 (1.10-1.30) times the time of theirs (why)",
        "- `b`: 1.01 (0.90-1.10) times the time, within the spread of the rounds of theirs",
        "- `d`: 1.50 times the memory of theirs",
    ]
    assert _page._more(rows[2:3]) == ["Nowhere."]


@pytest.mark.parametrize("arguments", [["--variants", "lorra"], ["--rounds", "1"], ["--model", "tiny", "--rank", "0"]])
def test_wrong_calls_are_refused_before_anything_runs(arguments, monkeypatch):
    monkeypatch.setattr(overhead, "measure", lambda *a: pytest.fail("it ran"))
    with pytest.raises(UserError):
        overhead.main(arguments)
