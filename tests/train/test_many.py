"""Many processes and one results folder: some die and come back, the disk is full or read-only; every record is whole."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from killing import Ended
from making import sweep
from runs import TINY

from lorafactory import record

SMALL = [*TINY, "task.train_size=24", "task.selection_size=8", "task.test_size=8", "train.steps=2", "train.checkpoint_every=1"]

@pytest.mark.parametrize(
    ("processes", "runs", "kills"), [(3, 8, 2), pytest.param(4, 50, 12, marks=pytest.mark.slow)]
)
def test_every_run_is_made_once_and_every_record_is_whole(tmp_path, monkeypatch, processes, runs, kills):
    """Two get the same list, the others overlapping halves; the killed ones are started again until all have ended well."""
    results, log, chance = tmp_path / "results", tmp_path / "made", random.Random(runs)

    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["warm"])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))

    def start(k: int) -> multiprocessing.Process:
        seeds = range(runs) if k < 2 else range(runs // 2 * (k % 2), runs // 2 * (k % 2) + runs // 2 + 1)
        chosen = ",".join(str(s) for s in seeds if s < runs)
        process = forks.Process(target=sweep, args=([*SMALL, f"seed={chosen}", f"results.folder={results}"], log))
        process.start()
        return process

    working = {k: start(k) for k in range(processes)}
    # the moments are numbers of records, spread over the sweep: some process is in the middle of something then
    moments = sorted(chance.sample(range(1, runs - 1), kills))
    died: dict[str, int] = {}  # when the kill was sent, by process
    while working:
        if moments and len(records(results)) >= moments[0]:
            moments.pop(0)
            k = chance.choice(sorted(working))
            sent = time.monotonic_ns()
            working[k].kill()
            working[k].join()
            if working[k].exitcode == -signal.SIGKILL:
                died[str(working[k].pid)] = sent
            working[k] = start(k)
        for k in [k for k, p in working.items() if not p.is_alive()]:
            assert working.pop(k).exitcode == 0
        time.sleep(0.005)
    assert died, "nothing was killed"
    made = [record.read(p) for p in records(results)]
    assert sorted(r["seed"] for r in made) == list(range(runs))
    assert all(record.read_predictions(p)["test"] for p in records(results))
    assert not [p for p in results.rglob("*") if p.suffix in (".tmp", ".lock", ".safetensors")]
    begun = made_by_one_at_a_time(log, died)
    assert runs <= begun <= runs + len(died), "a finished run was made again"


def records(results: Path) -> list[Path]:
    return [p for p in results.glob("*/adhoc/**/*.json") if not p.name.startswith(".")]


def made_by_one_at_a_time(log: Path, died: dict[str, int]) -> int:
    """How often a run was begun; no process begins one that a living one is at."""
    lines = [line.split() for line in log.read_text().splitlines()]
    at: dict[str, str] = {}
    for when, pid, id, what in sorted(lines, key=lambda line: int(line[0])):
        if what == "begins":
            assert id not in at or at[id] in died and int(when) > died[at[id]], f"{pid} and {at[id]} both make {id}"
            at[id] = pid
        else:
            assert at.pop(id) == pid
    return sum(line[3] == "begins" for line in lines)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk here")
    yield disk
    subprocess.run(["umount", disk], check=True)


RUN = ["run", *SMALL, "results.keep_adapter=true"]
ROOMS = (1, 4, 12, 20, 28, 40, 56, 58, 60, 62, 64, 66, 67, 69, 70, 72)
ENOUGH = 66  # pages from which on all may fit


def refused(ended: Ended, folder: Path, why: str) -> None:
    assert ended.status == 2, ended.said
    assert ended.said.count("\n") == 1 and str(folder) in ended.said and why in ended.said, ended.said


@pytest.mark.parametrize("room", [0, 2, 32, 68, *(pytest.param(n, marks=pytest.mark.slow) for n in ROOMS)])
def test_a_full_disk_is_one_line_and_nothing_half_written(small_disk, server, room):
    """room: pages that are left. However far the run comes, it leaves a whole checkpoint or none, and no half a record."""
    free = os.statvfs(small_disk).f_bavail - room
    (small_disk / "ballast").write_bytes(bytes(free * 4096))
    results = small_disk / "results"
    ended = server.run([*RUN, f"results.folder={results}"])
    if room < ENOUGH or ended.status:
        refused(ended, results, "No space left")
        assert not [p for p in (results / "runs", results / "scratch" / "adhoc") for p in p.rglob("*") if p.is_file()]
        for folder in (*results.glob("scratch/checkpoints/*/*"), *results.glob("adapters/*")):
            files = {p.name for p in folder.iterdir()}
            assert not folder.name.startswith(".") and files >= {"adapter.json", "adapter.safetensors"}
            assert "state.json" not in files or json.loads((folder / "state.json").read_text())["step"]
    (small_disk / "ballast").unlink()
    again = server.run([*RUN, f"results.folder={results}"])
    assert again.status == 0, again.said
    assert record.read_predictions(records(results)[0])["test"]


def test_a_read_only_disk_is_one_line(small_disk, server):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(server.run([*RUN, f"results.folder={small_disk / 'results'}"]), small_disk / "results", "Read-only file system")
