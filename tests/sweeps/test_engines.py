"""Hydra's launchers and the Optuna sweeper: a job that fails stops no other, and the last lines say which and why."""

import json
import signal
import subprocess
import time
from pathlib import Path

import optuna
import psutil
import pytest
from runs import TINY, command, environment

from lorafactory import record

SMALL = [*TINY, "task.train_size=24", "task.selection_size=8", "task.test_size=8", "train.steps=2"]
SGD = ["train.optimizer=sgd", "train.clip=0", "train.schedule=constant", "train.warmup=0"]  # diverges where lr is absurd


def records(results: Path) -> list[dict]:
    return [record.read(p) for p in sorted(results.glob("*/adhoc/**/*.json"))]


# a value that depends on the variant: a process that only unpickles a job must know our resolver, too
PICKED = "train.weight_decay='${pick:${hydra:runtime.choices.variant},{lora:0.25},0.5}'"


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_what_fails_or_diverges_stops_no_other_and_is_named(tmp_path, server, launcher):
    jobs = {"ok": ("4", "0.1"), "diverged": ("4", "1e30"), "failed": ("99", "0.1"), "failed too": ("99", "1e30")}
    if launcher == "submitit_local":  # a start of Python a job
        jobs.pop("diverged"), jobs.pop("failed too")
    ranks, rates = (",".join(dict.fromkeys(v)) for v in zip(*jobs.values(), strict=True))
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    options = ["run", "-m", f"hydra/launcher={launcher}", *more, *SMALL, *SGD, PICKED, f"results.folder={tmp_path}"]
    swept = server.run([*options, f"variant.rank={ranks}", f"train.lr={rates}"])
    assert swept.status == 1, swept.said
    lines = swept.said.splitlines()
    bad = [k for k in jobs if k != "ok"]
    said = f"1 ran, 0 found, {len([b for b in bad if 'failed' in b])} failed, {bad.count('diverged')} diverged"
    assert said in lines, swept.said
    last = lines[lines.index(said) + 1 :]
    assert len(last) == len(bad)
    assert all("rank 99 is more than" in x and "traceback.txt" in x for x in last if x.startswith("  failed: "))
    assert all("the loss is" in x and x.endswith(".json)") for x in last if x.startswith("  diverged: "))
    assert sorted(r["status"] for r in records(tmp_path)) == sorted(["ok", *(["diverged"] if "diverged" in bad else [])])
    assert all(r["config"]["train"]["weight_decay"] == 0.25 for r in records(tmp_path))
    again = server.run([*options[:2], *options[3 + len(more) :], "variant.rank=4", "train.lr=0.1"])
    assert again.status == 0 and "0 ran, 1 found" in again.said, "another launcher makes another run of it"


@pytest.mark.slow
def test_a_job_whose_process_dies_is_named(tmp_path):
    options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *SMALL, "train.checkpoint_every=1", "train.steps=99999"]
    run = command("run", "-m", *options, "variant=dora,lora", f"results.folder={tmp_path}")
    sweep = subprocess.Popen(run, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while sweep.poll() is None and len({p.parent for p in tmp_path.glob("scratch/checkpoints/*/step-*")}) < 2:
        time.sleep(0.05)
    for worker in psutil.Process(sweep.pid).children(recursive=True):
        if "LokyProcess" in " ".join(worker.cmdline()):
            worker.kill()
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 1, err
    assert "0 ran, 0 found, 0 failed, 0 diverged, 2 lost" in out and out.count("  lost: ") == 2 and "variant=dora" in out
    assert "TerminatedWorkerError" in out and "the same command" in out and "Traceback" not in out + err


def test_a_search_goes_on_after_a_kill_and_hears_of_divergence(tmp_path, server):
    options = ["run", "-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=1", *SMALL, *SGD,
               "results.experiment=found", "train.lr=0.01,1e30"]  # fmt: skip
    whole = server.run([*options, f"results.folder={tmp_path / 'a'}"], traced=True)
    assert whole.status == 1 and "FutureWarning" not in whole.said and "gave up" not in whole.said, whole.said
    values = {t.params["train.lr"]: t.value for t in study(tmp_path / "a").trials}
    assert values[1e30] == float("-inf") < values[0.01], "both are drawn in four"
    killed = [*options, f"results.folder={tmp_path / 'b'}"]
    late = whole.moments["train"][int(len(whole.moments["train"]) * 0.6)]
    assert server.run(killed, kill_at=late).status == -signal.SIGKILL
    before = study(tmp_path / "b").trials
    assert before[0].state.name == "COMPLETE" and before[-1].state.name == "RUNNING"
    again = server.run(killed)
    assert again.status == 1 and ", 0 failed, " in again.said and "\nfound     train.lr=" in again.said, again.said
    after = study(tmp_path / "b").trials
    assert len(after) == len(before) + 4
    assert [(t.params, t.values) for t in after[: len(before) - 1]] == [(t.params, t.values) for t in before[:-1]]
    assert study(tmp_path / "b").best_value == values[0.01]


def study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="found", storage=f"sqlite:///{folder}/scratch/studies.db")


def test_a_lost_job_is_not_left_out(tmp_path, capsys):
    from lorafactory.launch import _summary

    for k, status in enumerate(("ok", "lost")):
        (tmp_path / str(k)).mkdir()
        text = {"label": f"seed={k}", "status": status, "reason": "because", "path": "there"}
        (tmp_path / str(k) / "outcome.json").write_text(json.dumps(text))
    assert _summary(tmp_path, "") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "  lost: seed=1: because (there)"
