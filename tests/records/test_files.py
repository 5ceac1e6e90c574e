"""Files are whole or not there; one process at a time, and a dead one holds nothing."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lorafactory.errors import UserError
from lorafactory.files import lock, remove, tidy, write_whole

KILLED_IN_WRITING = """
import os, signal, sys
from pathlib import Path
from lorafactory import files
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(files.os, sys.argv[2], die)
files.write_whole(Path(sys.argv[1]), b"new" * 100000)
"""
KILLED_IN_REMOVING = """
import os, signal, sys
from pathlib import Path
from lorafactory import files
def die(folder, **_):
    if folder.exists():
        next(folder.iterdir()).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
files.shutil.rmtree = die
files.remove(Path(sys.argv[1]))
"""
HOLDING = """
import sys, time
from pathlib import Path
from lorafactory.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_kill_leaves_the_old_file_or_none(tmp_path, moment, before):
    path = tmp_path / "file.json"
    if before is not None:
        path.write_bytes(before)
    assert python(KILLED_IN_WRITING, path, moment).wait() == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == before
    write_whole(path, b"next")
    assert path.read_bytes() == b"next"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device"):
        write_whole(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_goes_whole_or_stays_whole(tmp_path):
    folder = tmp_path / "step"
    for again in range(2):
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text(name)
        if not again:
            assert python(KILLED_IN_REMOVING, folder).wait() == -signal.SIGKILL
            assert not folder.exists(), "half a folder under its own name"
    remove(folder)
    remove(folder)  # what is not there is no mistake
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_tidied_and_nothing_else(tmp_path):
    for name in (".step-3.x", ".other", "step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".step-3.tmp").touch()
    tidy(tmp_path, ".step-3*")
    assert {p.name for p in tmp_path.iterdir()} == {".other", "step-3"}


@pytest.mark.parametrize("write", [lambda p: write_whole(p, b""), lambda p: lock(p).__enter__()])
def test_a_folder_that_cannot_be_is_one_line(tmp_path, write):
    (tmp_path / "results").write_text("a file in the folder's place")
    with pytest.raises(UserError, match="cannot write") as error:
        write(tmp_path / "results" / "runs" / "file")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / "file", b"")


def test_a_second_process_is_refused_or_waits(tmp_path):
    path = tmp_path / "run.json"
    holder = python(HOLDING, path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"run.json is being made by process {holder.pid} on "), lock(path, wait=False):
        pass
    entered = threading.Event()

    def wait():
        with lock(path):
            entered.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not entered.wait(0.3)
    holder.kill()  # the lock dies with its holder
    holder.wait()
    waiter.join(10)
    assert entered.is_set()
    assert list(tmp_path.iterdir()) == []


def count_up(path, times):
    for _ in range(times):
        with lock(path):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


def test_many_processes_take_turns(tmp_path):
    path = tmp_path / "number"
    path.write_text("0")
    workers = [multiprocessing.get_context("fork").Process(target=count_up, args=(path, 20)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert path.read_text() == "80"
    assert list(tmp_path.iterdir()) == [path]


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    with lock(tmp_path / "run"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
    with lock(tmp_path / "run", wait=False):
        pass
    child.kill()
    child.join()
