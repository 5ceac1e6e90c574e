"""Killed at any moment and started again, a run ends with the same bits; a torn checkpoint is named and passed over."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from killing import draw
from runs import TINY, command, configured, environment, lorafactory, trainer

from lorafactory import checkpoint, course, record, run

SLOW = [pytest.param(f"variant={v}", marks=pytest.mark.slow) for v in ("full", "lora", "adalora", "lora_pro", "galore", "relora")]
RUN = ["run", *TINY, "train.steps=30", "train.checkpoint_every=3", "train.batch_size=16", "train.micro_batch_size=6"]


def only_record(results: Path) -> Path:
    (path,) = [p for p in results.glob("*/adhoc/**/*.json") if "checkpoints" not in p.parts]
    return path


def numbers(results: Path) -> dict:
    """What of a record must be the same bits: everything that is not a time or a place."""
    path = only_record(results)
    made = record.read(path)
    raw = record.read_predictions(path)
    return {k: made[k] for k in ("id", "status", "metrics", "curve", "evaluations", "adapted", "optimizer")} | {"raw": raw}


@pytest.mark.parametrize("variant", ["variant=dora+pissa+lora_plus", *SLOW])
def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path, variant):
    options = [*RUN, variant, "train.eval_every=4", "train.keep=best"]
    if variant not in ("variant=full", "variant=galore"):
        options.append("variant.dropout=0.2")
    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    assert lorafactory(*options, f"results.folder={undisturbed}").returncode == 0
    child = subprocess.Popen(command(*options, f"results.folder={killed}"), env=environment(), stdout=subprocess.DEVNULL)
    while child.poll() is None and not list(killed.glob("scratch/checkpoints/*/step-*")):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL, "it ended before it could be killed"
    again = lorafactory(*options, f"results.folder={killed}")
    assert again.returncode == 0, again.stderr
    assert numbers(undisturbed) == numbers(killed)
    assert not list(killed.glob("scratch/checkpoints/*/*"))


# dropout, accumulation, evaluations that keep the best; one whose ranks change, composites with restarts and with ranks from data
LIFE = ["run", *TINY, "train.steps=12", "train.batch_size=8", "train.micro_batch_size=3", "train.checkpoint_every=3",
        "train.eval_every=4", "train.keep=best", "train.lr=1e-2", "results.keep_adapter=true", "variant.dropout=0.2",
        "task.train_size=64", "task.selection_size=24", "task.test_size=24"]  # fmt: skip
CHANGED = {
    "adalora": lambda made: len({a["rank"] for a in made["adapted"]}) > 1,
    "dora+pissa+relora": lambda made: made["optimizer"]["method"]["restarts"] > 1,
    "dora+gelora": lambda made: len({a["rank"] for a in made["adapted"]}) > 1,
}


def left(results: Path) -> dict:
    """What a run leaves that must be the same bits, its adapter included."""
    (adapter,) = (results / "adapters").iterdir()
    return numbers(results) | {"adapter": (adapter / "adapter.safetensors").read_bytes()}


def names(results: Path) -> set[str]:
    return {str(p.relative_to(results)) for p in results.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("variant", "kills"),
    [("adalora", 2), ("dora+pissa+relora", 1), *(pytest.param(v, 20, marks=pytest.mark.slow) for v in CHANGED)],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, server, variant, kills):
    """Each kill leaves a results folder in which the same command is killed once more, and then ends."""
    options = [*LIFE, f"variant={variant}"]
    undisturbed = server.run([*options, f"results.folder={tmp_path / 'a'}"], traced=True)
    assert undisturbed.status == 0, undisturbed.said
    expected = left(tmp_path / "a")
    assert CHANGED[variant](record.read(only_record(tmp_path / "a"))), "this run does not change what it says"
    for k, moment in enumerate(draw(undisturbed.moments, kills, variant)):
        again = [*options, f"results.folder={tmp_path / str(k)}"]
        assert server.run(again, kill_at=moment).status == -signal.SIGKILL, moment
        if k % 2:
            server.run(again, kill_at=moment // 2)
        ended = server.run(again)
        assert ended.status == 0, (moment, ended.said)
        assert left(tmp_path / str(k)) == expected, moment
        assert names(tmp_path / str(k)) == names(tmp_path / "a"), moment  # nothing half-written stays


PART = "{task: toy, train_size: 48, selection_size: 12, test_size: 12}"
STAGES = [f"{PART[:-1]}, classes: [red, blue]}}", PART, PART]
SEQUENCE = ["run", *TINY, "task=sequence", f"task.stages=[{', '.join(STAGES[:2])}]", "train.steps=6", "train.batch_size=8",
        "train.checkpoint_every=3", "train.eval_every=4", "train.keep=best", "train.lr=1e-2", "results.keep_adapter=true",
        "variant.dropout=0.2"]  # fmt: skip
THREE = [*SEQUENCE, f"task.stages=[{', '.join(STAGES)}]"]
LEARNERS = {  # what each keeps of earlier stages: frozen pairs, directions of inputs, ranks that live, a basis for all
    "dora+pissa": SEQUENCE,
    "o_lora": [*THREE, "variant.continual.norm=0.01"],
    "inflora": [*THREE, "variant.continual.batches=4", "variant.continual.threshold=0.8"],
    "codyra": [*THREE, "variant.budget.most=0.2"],
    "share": [*THREE, "variant.components=12"],
    "dylora": SEQUENCE,  # scores its truncations
    "lora": [*SEQUENCE, f"task.stages=[{PART}, {PART}]", "task.heads=shared", "task.unlabelled=[1]"],  # answers as it adapts
}


@pytest.mark.parametrize(
    ("variant", "kills"), [("dora+pissa", 2), ("inflora", 3), *(pytest.param(v, 22, marks=pytest.mark.slow) for v in LEARNERS)]
)
def test_a_sequence_killed_in_any_stage_ends_with_the_same_bits(tmp_path, server, variant, kills):
    options = [*LEARNERS[variant], f"variant={variant}"]
    undisturbed = server.run([*options, f"results.folder={tmp_path / 'a'}"], traced=True)
    assert undisturbed.status == 0, undisturbed.said
    expected = left(tmp_path / "a")
    # in a stage after the first; between two; then anywhere
    lines, own = undisturbed.moments["train"], undisturbed.moments["course"]
    moments = [lines[len(lines) * 3 // 4], own[len(own) * 2 // 3], *draw(undisturbed.moments, kills, variant)]
    for k, moment in enumerate(moments[:kills]):
        again = [*options, f"results.folder={tmp_path / str(k)}"]
        assert server.run(again, kill_at=moment).status == -signal.SIGKILL, moment
        ended = server.run(again)
        assert ended.status == 0, (moment, ended.said)
        assert left(tmp_path / str(k)) == expected, moment
        assert names(tmp_path / str(k)) == names(tmp_path / "a"), moment


def test_a_torn_stage_is_passed_over(tmp_path, monkeypatch, caplog):
    """The stage before it counts, and is trained on from."""
    options = [o for o in SEQUENCE[4:] if not o.startswith("results")]
    whole = run.run(configured(*options, f"results.folder={tmp_path / 'a'}")).record

    def stop(self):
        if self.past.step == 2:
            raise KeyboardInterrupt
        return score(self)

    score = course.Course._score
    monkeypatch.setattr(course.Course, "_score", stop)
    with pytest.raises(KeyboardInterrupt, match="goes on from"):
        run.run(configured(*options, f"results.folder={tmp_path / 'b'}"))
    monkeypatch.setattr(course.Course, "_score", score)
    (folder,) = (tmp_path / "b/scratch/checkpoints").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["stage-001", "step-000000", "step-000001"]
    (folder / "step-000001/adapter.safetensors").write_bytes(b"")
    assert checkpoint.read_json(folder / "step-000000/state.json")["step"] == 0
    again = run.run(configured(*options, f"results.folder={tmp_path / 'b'}")).record
    assert "step-000001 cannot be used" in caplog.text
    assert again["metrics"] == whole["metrics"] and again["curve"] == whole["curve"]


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    options = [*RUN, "train.steps=5000", "train.checkpoint_every=7", f"results.folder={tmp_path}"]
    child = subprocess.Popen(command(*options), env=environment(), stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not list(tmp_path.glob("scratch/checkpoints/*/step-*")):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "Traceback" not in said
    assert "goes on from" in said
    newest = sorted(tmp_path.glob("scratch/checkpoints/*/step-*"))[-1]
    assert newest.name in said or str(newest.parent) in said
    assert checkpoint.read_json(newest / "state.json")["step"] >= 7


@pytest.mark.parametrize(("every", "told"), [(2, "goes on from"), (0, "before the first checkpoint")])
def test_ctrl_c_outside_of_training_says_so_too(tmp_path, monkeypatch, every, told):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(course.Course, "_score", stop)
    with pytest.raises(KeyboardInterrupt, match=told):
        run.run(configured("train.steps=4", f"train.checkpoint_every={every}", f"results.folder={tmp_path}"))


def interrupted(folder: Path, steps: int = 6):
    """A trainer that checkpointed every other step and was dropped before its end."""
    t = trainer(folder, "train.checkpoint_every=2", "train.steps=12")
    t.adapted.train()
    for step in range(steps):
        t.progress.step = step + 1
        t._step(step)
        if t.progress.step % 2 == 0:
            t.checkpoints.save(t.progress, t.lifecycle.optimizer)
    return t


@pytest.mark.parametrize("damage", ["empty", "half", "gone", "json", "other"])
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, caplog):
    """B28"""
    interrupted(tmp_path)
    newest = sorted(tmp_path.glob("step-*"))[-1]
    tensors = newest / "adapter.safetensors"
    if damage == "empty":
        tensors.write_bytes(b"")
    elif damage == "half":
        tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    elif damage == "gone":
        (newest / "optimizer.safetensors").unlink()
    elif damage == "json":
        (newest / "state.json").write_text('{"step": 6')
    else:
        about = checkpoint.read_tensors(tensors)
        about.popitem()
        checkpoint.save_file(about, tensors)
    t = trainer(tmp_path, "train.checkpoint_every=2", "train.steps=12")
    assert t.progress.step == 4
    assert newest.name in caplog.text


def test_going_on_in_the_same_process_is_bit_equal(tmp_path):
    straight = trainer(tmp_path / "a", "train.steps=12")
    straight.train()
    interrupted(tmp_path / "b")
    resumed = trainer(tmp_path / "b", "train.checkpoint_every=2", "train.steps=12")
    assert resumed.progress.step == 6
    resumed.train()
    a, b = straight.adapted.adapter.state_dict(), resumed.adapted.adapter.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[n]) for n, t in a.items())


def test_old_checkpoints_go_and_two_stay(tmp_path):
    interrupted(tmp_path, 12)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-000010", "step-000012"]


def test_a_checkpoint_is_json_and_safetensors_only(tmp_path):
    t = interrupted(tmp_path)
    folder = sorted(tmp_path.glob("step-*"))[-1]
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 6
    assert os.stat(folder / "optimizer.safetensors").st_size > sum(p.numel() for p in t.adapted.adapter.parameters()) * 4
