"""Programs written by a model: only those that run to their end pass, and none leaves a trace (B52, B53)."""

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hostile import KINDS, LATE, RAN, program
from samples import refused

from lorafactory.tasks import sandbox
from lorafactory.tasks.sandbox import Limits, run

needs_sandbox = pytest.mark.skipif(bool(sandbox.available()), reason=str(sandbox.available()))
SMALL = {"memory_bytes": 2**28, "file_bytes": 2**22}
PLACES = {Path(p) for p in ("/", "/usr", "/root", "/home", "/var/tmp", "/dev/shm", "/dev", tempfile.gettempdir())}
PLACES |= {Path.home(), Path.cwd(), sandbox.JAIL}


def alive(*words):
    """Processes of whose command line all words are arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if {w.encode() for w in words} <= set((folder / "cmdline").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def left(tag, caller):
    names = [p for place in PLACES if place.is_dir() for p in os.listdir(place) if tag in p]
    mounts = [m for m in Path("/proc/self/mountinfo").read_text().splitlines() if " lorafactory " in m]
    return alive(tag) + alive("jail", str(caller)) + names + mounts


@pytest.fixture
def listeners():
    """A TCP port on each loopback address, and a name among the abstract ones: who connects is seen."""
    tag = uuid.uuid4().hex
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    with tcp, unix:
        unix.bind("\0" + tag)
        unix.listen()
        for s in (tcp, unix):
            s.setblocking(False)
        yield tag, tcp, unix


@needs_sandbox
@pytest.mark.parametrize("kind", KINDS)
def test_B53_a_hostile_program_fails_and_leaves_nothing(kind, listeners):
    tag, tcp, unix = listeners
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=Path.home()) as at_home:
        canaries = [Path(f) / "canary" for f in (folder, at_home)]
        for canary in canaries:
            canary.write_text("alive")
            canary.chmod(0o666)
        names = {"TAG": tag, "HOST": os.getpid(), "PORT": tcp.getsockname()[1]}
        for seconds in (1.0, 60.0):
            some = [(source, right) for source, right in KINDS[kind] if (LATE in right) == (seconds == 1.0)]
            programs = [program(s, CANARY=canaries[i % 2], **names) for i, (s, _) in enumerate(some)]
            for (source, right), verdict in zip(some, run(programs, Limits(seconds=seconds, **SMALL), 2), strict=True):
                assert not verdict.passed and re.search(right, verdict.reason), (source, verdict.reason)
                assert len(verdict.reason) <= 200 and verdict.reason.isprintable()
        assert left(tag, os.getpid()) == []
        assert [c.read_text() for c in canaries] == ["alive"] * 2
        for listener in (tcp, unix):
            with pytest.raises(BlockingIOError):
                listener.accept()


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="all other tests are of an ordinary user already")
def test_B53_the_walls_of_an_ordinary_user_hold_too(monkeypatch):
    """Root runs the sandbox as nobody: from another copy, and by another Python where it keeps its own to itself."""
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with suppress(OSError):
            if subprocess.run([python, "-c", code], **nobody).returncode == 0:
                break
    else:
        pytest.skip("no Python 3.11 that nobody may run")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(sandbox, "JAIL", shutil.copytree(sandbox.JAIL, Path(folder, "jail")))
        monkeypatch.setattr(sandbox.sys, "executable", python)
        monkeypatch.setattr(sandbox.subprocess, "Popen", partial(subprocess.Popen, **nobody))
        if why := sandbox.available.__wrapped__():
            assert "does not hold" not in why
            pytest.skip(f"nobody may not: {why}")
        some = [case for kind in ("fork bomb", "signals", "rights", "files") for case in KINDS[kind] if LATE not in case[1]]
        names = {"TAG": uuid.uuid4().hex, "HOST": os.getpid(), "CANARY": sandbox.JAIL / "walls.py"}
        verdicts = run([program(source, **names) for source, _ in some], Limits(seconds=60, **SMALL), 2)
        for (source, right), verdict in zip(some, verdicts, strict=True):
            assert not verdict.passed and re.search(right, verdict.reason), (source, verdict.reason)
        assert left(names["TAG"], os.getpid()) == []


def test_B53_there_are_a_hundred_hostile_programs():
    assert len({source for some in KINDS.values() for source, _ in some}) >= 100


def test_where_the_system_allows_a_sandbox_it_holds():
    """Else every test here would be skipped for a fault of ours."""
    assert "does not hold" not in str(sandbox.available())


@needs_sandbox
def test_B53_what_is_harmless_may_be_done():
    fine = {
        "files": "open('a', 'w').write('x' * 1000)\nassert open('/tmp/a').read() == 'x' * 1000",
        "output": "print('x' * 10**6)\nsys.stdout.close()",
        "threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "classes": "from dataclasses import *\nimport pickle\n@dataclass\nclass A: x: int\n"
        "assert pickle.loads(pickle.dumps(A(1))) == A(1)",
        "modules": "import math, re, random, collections, itertools, hashlib, datetime, decimal, typing, heapq, ctypes",
        "main": "if __name__ == '__main__': 1 / 0",
        "atexit": "import atexit\natexit.register(time.sleep, 1000)",
        "nothing": "",
    }
    verdicts = run(["import sys, time\n" + source for source in fine.values()], workers=2)
    assert {n: v.reason for n, v in zip(fine, verdicts, strict=True) if not v.passed} == {}


@needs_sandbox
def test_a_verdict_is_the_same_every_time():
    assert len({v.reason for v in run(["assert False, hash('x')"] * 3)}) == 1


@needs_sandbox
def test_B53_time_of_the_processor_counts_too():
    child = "import os\nif not os.fork():\n    while True: pass\nassert os.wait()[1] == 24"  # SIGXCPU
    verdicts = run([child, "import os\nos.kill(os.getpid(), 24)"], Limits(seconds=60, cpu_seconds=1))
    assert [v.reason for v in verdicts] == ["passed", "timeout"]


PROBLEMS = {
    "def double(x):\n": ("    return 2 * x\n", "    return x\n", "assert candidate(3) == 6", "double"),
    "def first(s):\n    ''' The first. '''\n": ("    return s[0]\n", "    return s\n", "assert candidate('ba') == 'b'", "first"),
    "from typing import List\n\ndef total(x: List[int]) -> int:\n": (
        "    return sum(x)\n", "    return len(x)\n", "assert candidate([1, 2]) == 3\n    assert candidate([]) == 0", "total"),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("prompt", PROBLEMS)
def test_B52_only_the_correct_solution_passes(prompt):
    right, wrong, tests, name = PROBLEMS[prompt]
    checker = "    pass\n\ndef check(candidate):\n    return True\n"
    answers = [right, wrong, "    raise KeyError\n", "", checker, "    return Anything()\n"]
    whole = [f"{prompt}{a}\n\ndef check(candidate):\n    {tests}\n\ncheck({name})\n" for a in answers]
    assert [v.passed for v in run(whole, workers=2)] == [True, False, False, False, False, False]


@needs_sandbox
@pytest.mark.parametrize("right", (True, False))
def test_B52_the_solutions_of_humaneval_pass_and_empty_ones_do_not(right, data):
    file = data / "humaneval" / "HumanEval.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no HumanEval in {data}")
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()][:: 1 if right else 4]
    answers = [row["canonical_solution"] if right else "    pass\n" for row in rows]
    whole = [f"{r['prompt']}{a}\n{r['test']}\ncheck({r['entry_point']})\n" for r, a in zip(rows, answers, strict=True)]
    verdicts = run(whole, Limits(seconds=60, cpu_seconds=60), workers=2)
    assert len(rows) == (164 if right else 41)
    assert [r["task_id"] for r, v in zip(rows, verdicts, strict=True) if v.passed != right] == []


@needs_sandbox
@pytest.mark.parametrize("how", (signal.SIGINT, signal.SIGKILL))
def test_nothing_outlives_the_caller(how):
    """Ctrl-C and kill, while a program sleeps that has ten minutes."""
    source = """if True:
        import signal
        from lorafactory.tasks.sandbox import *
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
        print(available(), flush=True)
        run(["import time; time.sleep(600)"] * 3, Limits(seconds=600), 1)"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", source], **pipes) as caller:
        try:
            mine = "jail", str(caller.pid)
            assert caller.stdout.readline() == "None\n"
            until = time.monotonic() + 60
            while (seen := len(alive(*mine))) < 3 and time.monotonic() < until:  # launcher, init, program
                time.sleep(0.05)
            caller.send_signal(how)
            said = caller.communicate(timeout=60)[1]
        finally:
            caller.kill()
    while alive(*mine) and time.monotonic() < until:
        time.sleep(0.05)
    assert seen == 3 and alive(*mine) == []
    assert caller.returncode == -how and ("KeyboardInterrupt" in said) == (how == signal.SIGINT)


def test_without_namespaces_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "available", lambda: "unshare: Operation not permitted")
    refused(lambda: run(["1"]), "written by a model", "unshare: Operation not permitted")


@pytest.mark.parametrize("name", Limits.__dataclass_fields__)
def test_a_limit_is_more_than_nothing(name):
    refused(lambda: Limits(**{name: 0}), f"{name}=0")


@needs_sandbox
def test_a_launcher_that_fails_judges_nothing(monkeypatch, tmp_path):
    assert RAN not in sandbox.PROBE
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "gone")
    with pytest.raises(RuntimeError, match=r"no sandbox could be made.*gone"):
        run(["1"])
