"""A record: its identity, its place, written whole, read with care."""

import gzip
import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from fabricate import diverged, fabricate, merged

from lorafactory import record, registry
from lorafactory.errors import UserError

HERE = {"experiment": "demo", "variant": "lora", "task": "bbc", "model": "minilm", "seed": 0}


def test_committed_records_keep_their_ids():
    """An axis or an option that is new, and empty unless asked for, makes no run another one."""
    found = sorted(Path(__file__).parents[2].glob("results/runs/*/*/*-s0-*.json"))
    assert found
    for path in {p.parent: p for p in found}.values():
        made = record.read(path)
        variant = asdict(registry.from_dict(made["config"]["variant"]))
        assert record.run_id({**made["config"], "variant": variant}) == made["id"], path


def test_the_id_is_of_what_can_change_a_number():
    config = fabricate()["config"]
    same = [
        {"train": {"lr": 0.001}},
        {"train": {"checkpoint_every": 7}},
        {"train": {"steps": 40.0}},
        {"train": {"clip": None}},
        {"variant": {"dynamics": {"name": ""}}},
        {"variant": {"continual": {"name": ""}}},
        {"results": {"folder": "elsewhere", "experiment": "other"}},
        {"wandb": {"mode": "online"}},
    ]
    other = [
        {"train": {"lr": 2e-3}},
        {"train": {"bias": False}},
        {"seed": 1},
        {"variant": {"name": "dora"}},
        {"variant": {"init": {"name": "pissa"}}},
        {"model": {"source": "elsewhere"}},
        {"variant": {"rank_pattern": {"query": 4}}},
        {"variant": {"targets": ["query", "value"]}},
        {"variant": {"targets": ["value", "query"]}},
    ]
    assert {record.run_id(merged(config, change)) for change in same} == {record.run_id(config)}
    assert len({record.run_id(merged(config, change)) for change in [{}, *other]}) == len(other) + 1
    backwards = dict(reversed(config.items()))
    assert record.run_id(backwards) == record.run_id(json.loads(json.dumps(config))) == record.run_id(config)
    assert len(record.run_id(config)) == 12


def test_an_id_stays_what_it_was():
    """Committed records are found by it."""
    assert record.run_id({"train": {"lr": 1e-3, "steps": 40}, "seed": 0, "variant": {"name": "lora"}}) == "bda376a27c2e"


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a b", "-x", ".hidden", "a\nb"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(UserError, match="cannot name a folder"):
        record.path_of("results", **{**HERE, "experiment": name}, id="0" * 12)


def test_path():
    path = record.path_of("results", **{**HERE, "variant": "dora+pissa"}, id="0123456789ab")
    assert path == Path("results/runs/demo/dora+pissa/bbc-minilm-s0-0123456789ab.json")
    assert "results/scratch/demo" in str(record.path_of("results", **HERE, id="0" * 12, scratch=True))


def test_round_trip(results):
    made = fabricate()
    path = results.put(made, {"selection": [[0.5, 1.5]], "test": [[1.0, 2.0]]})
    assert {k: v for k, v in record.read(path).items() if k != "predictions"} == made
    assert record.read_predictions(path) == {"selection": [[0.5, 1.5]], "test": [[1.0, 2.0]]}
    assert len(path.read_text().splitlines()) == len(made) + 3  # a section a line
    first = [p.read_bytes() for p in sorted(path.parent.iterdir())]
    results.put(made, {"selection": [[0.5, 1.5]], "test": [[1.0, 2.0]]})
    assert [p.read_bytes() for p in sorted(path.parent.iterdir())] == first


def test_what_is_not_finite_is_null_with_its_reason(results):
    made = fabricate(metrics={"test": {"accuracy": math.nan, "other": np.float64("inf")}})
    made["curve"] = [{"step": 1, "loss": torch.tensor(float("-inf"))}, {"step": 2, "loss": np.float32(0.5)}]
    path = results.put(made, {"selection": [], "test": [[math.nan, 1.0]]})
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    back = record.read(path)
    assert back["metrics"]["test"]["accuracy"] is None and back["metrics"]["test"]["accuracy_undefined"] == "nan"
    assert back["metrics"]["test"]["other_undefined"] == "inf"
    assert back["curve"] == [{"step": 1, "loss": None, "loss_undefined": "-inf"}, {"step": 2, "loss": 0.5}]
    assert record.read_predictions(path)["test"] == [[None, 1.0]]


def test_a_reason_that_is_there_is_kept(results):
    path = results.add(metrics={"test": {"accuracy": math.nan, "accuracy_undefined": "no rows"}})
    assert record.read(path)["metrics"]["test"]["accuracy_undefined"] == "no rows"


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from fabricate import Results, fabricate
from lorafactory import files
real, calls = files.os.replace, []
def replace(*arguments):
    calls.append(arguments)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
files.os.replace = replace
Results(Path(sys.argv[1])).put(fabricate(), {"test": [1]})
"""


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_writing_leaves_no_half_record(results, call):
    """1: at the predictions, 2: at the record itself."""
    tests = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, str(results.folder), tests, str(call)])
    assert done.returncode == -signal.SIGKILL
    assert record.read_all(results.folder / "runs") == ({}, [])
    made = fabricate()
    assert record.find(results.folder, **HERE, id=made["id"]) is None
    path = results.put(made, {"test": [1]})
    assert record.find(results.folder, **HERE, id=made["id"]) == path and record.read_predictions(path) == {"test": [1]}


def test_an_incomplete_record_is_not_written(results):
    made = fabricate()
    del made["cost"]
    with pytest.raises(UserError, match="cost must be of type dict"):
        results.put(made)
    assert not results.folder.exists()


BROKEN = [
    (lambda text: text[: len(text) // 2], "is broken"),
    (lambda text: "", "is broken"),
    (lambda text: "[1, 2]", "is no record"),
    (lambda text: text.replace('"schema": 1', '"schema": 99'), "has schema 99"),
    (lambda text: text.replace('"status": "ok"', '"status": "fine"'), "reason must be"),
    (lambda text: text.replace('"seed": 0,\n', '"seed": "0",\n'), "seed must be of type int"),
    (lambda text: text.replace('"train_seconds": 10.0', '"train_seconds": NaN'), "holds NaN"),
    (lambda text: text.replace('"id": "', '"id": "x'), "carries the id"),
    (lambda text: text.replace('"primary": "accuracy", ', ""), "metrics lack primary"),
]


@pytest.mark.parametrize("breaking, message", BROKEN)
def test_a_broken_record_is_left_out_by_name(results, breaking, message, caplog):
    good, bad = results.add(seed=1), results.add(seed=0)
    before = bad.read_text()
    bad.write_text(breaking(before))
    assert bad.read_text() != before
    records, left_out = record.read_all(results.folder / "runs")
    assert list(records) == [good]
    assert len(left_out) == 1 and str(bad) in left_out[0] and message in left_out[0] and "\n" not in left_out[0]
    with pytest.raises(UserError, match=message):
        record.read(bad)
    assert record.find(results.folder, **HERE, id=fabricate()["id"]) is None
    assert "the run is made again" in caplog.text


def test_predictions_keep_every_float32(results):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500)).astype(np.float32)
    path = results.put(fabricate(), {"test": [values.tolist(), [1, True, None, "text"]]})
    numbers, others = record.read_predictions(path)["test"]
    assert np.array_equal(np.asarray(numbers, np.float32), values) and others == [1, True, None, "text"]
    assert all(x == float(f"{x:.9g}") for x in numbers) and numbers != values.tolist()


def test_predictions_that_are_not_its_own_are_refused(results):
    path = results.put(fabricate(), {"test": [1]})
    beside = path.with_name(path.stem + ".predictions.json.gz")
    whole = beside.read_bytes()
    for content in (gzip.compress(b'{"test": [2]}'), whole[:10], b""):
        beside.write_bytes(content)
        with pytest.raises(UserError, match="predictions"):
            record.read_predictions(path)
    with pytest.raises(UserError, match="has no predictions"):
        record.read_predictions(results.add(seed=1))


def test_where_a_run_is_found(results, monkeypatch):
    monkeypatch.setattr(record, "environment", lambda: {"source": "s0"})
    made = fabricate()

    def found():
        return record.find(results.folder, **HERE, id=made["id"])

    assert found() is None
    failed = results.put(fabricate(status="failed", reason="out of memory"))
    assert "scratch" in str(failed) and found() is None  # a failed run is made again
    dirty = results.put(fabricate(environment={"dirty": True}))
    assert dirty == failed and found() == dirty
    results.put(fabricate(environment={"dirty": True, "source": "s1"}))
    assert found() is None  # the code has changed since
    committed = results.put(made)
    assert found() == committed
    results.put(fabricate(**diverged()))
    assert found() == committed
