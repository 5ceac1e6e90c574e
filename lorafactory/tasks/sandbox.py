"""Runs Python programs that a model wrote, and says of each whether it ran to its end.

Each program has a process of its own (jail/__main__.py) in new namespaces of processes, network, mounts, shared objects
and users, as a user without rights. It sees /tmp, which is empty, its own and limited in size, and, read-only, the
interpreter and the system's libraries: none of the caller's files, no installed packages of the caller's environment, no
/proc, no network, no environment, an empty stdin; its output is thrown away. When it ends or its time is over, all that
it started ends with it; nothing of it was ever on disk. Hashes of strings are the same every time, so that a verdict can
be repeated.

A pass means that the last line was reached without an exception. Leaving early (exit, os._exit, a signal), what is
printed or written into the descriptors found open, and what builtins were replaced by do not make one.

It does not protect from:
- a program that passes unfairly: its answer may equal everything, know the tests, or change the modules they use. And it
  shares the interpreter with the runner: one that searches its memory (gc, ctypes, tracing) can forge a pass.
- memory that no process's address space holds (memfd, on some kernels System V's), and `processes` times the limit. The
  kernel then ends the program before others.
- reading what is under /usr and in the interpreter's folder.
- faults of the kernel, side channels, and so a determined attacker. Such programs deserve a machine of their own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event

from ..errors import UserError

JAIL = Path(__file__).with_name("jail")
PROBE = """
import os, random, signal, socket

def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        return
    raise AssertionError(f"{call.__name__} {arguments} is not refused")

assert os.getpid() == 2 and os.getuid() != 0 and os.listdir() == []
open("own", "w").close()
refused(open, "/own", "w")
refused(open, os.__file__, "a")
refused(os.stat, "/proc")
refused(os.stat, "/etc/passwd")
refused(socket.socket(type=socket.SOCK_DGRAM).connect, ("192.0.2.1", 9))
os.fork() or signal.pause()
refused(os.fork)
"""


@dataclass(frozen=True)
class Limits:
    seconds: float = 10.0  # of the clock, from the program's first line on
    cpu_seconds: int = 10  # of each process
    memory_bytes: int = 2**30  # of each process: its address space
    file_bytes: int = 2**24  # of all its files together
    processes: int = 4  # at a time, threads included

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise UserError(f"{name}={value}: give more than 0")


@dataclass(frozen=True)
class Verdict:
    """reason: "passed", "timeout", "out of memory", "exited before the tests ended", or "failed: " and why, a line."""

    passed: bool
    reason: str


DEFAULT = Limits()


@functools.cache
def available() -> str | None:
    """None where programs can be run safely, which is tried; else why not."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux's namespaces; this is {sys.platform}"
    try:
        (verdict,) = _run([PROBE], Limits(processes=2), 1)
    except (OSError, RuntimeError) as e:
        return str(e)
    return None if verdict.passed else f"the sandbox does not hold on this system: {verdict.reason}"


def run(programs: Sequence[str], limits: Limits = DEFAULT, workers: int | None = None) -> list[Verdict]:
    """A verdict for each program, whole Python source: the solution, its tests, and the call that runs them.

    workers: how many run at a time; None: one for each core. Raises UserError where available() says why not, and
    RuntimeError where no sandbox could be made all the same; a program is then not judged.
    """
    if why := available():
        raise UserError(f"cannot run programs written by a model: {why}")
    return _run(programs, limits, workers or len(os.sched_getaffinity(0)))


def _run(programs: Sequence[str], limits: Limits, workers: int) -> list[Verdict]:
    running: set[subprocess.Popen[bytes]] = set()
    stopped = Event()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_one, program, limits, running, stopped) for program in programs]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C, too: nothing may run on until its time is over
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for launcher in list(running):
                launcher.kill()
            raise


def _one(program: str, limits: Limits, running: set[subprocess.Popen[bytes]], stopped: Event) -> Verdict:
    order = json.dumps({"program": program, **asdict(limits)}).encode() + b"\n"
    command = [sys.executable, "-s", "-S", "-m", JAIL.name, str(os.getpid())]  # the number says whose it is, to `ps`
    with subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,  # stays open: its end tells the launcher that the caller is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=JAIL.parent,
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,
    ) as launcher:
        assert launcher.stdin and launcher.stdout
        running.add(launcher)
        try:
            if stopped.is_set():
                launcher.kill()
            with suppress(BrokenPipeError):  # it ended before: what it said tells why
                while order:
                    order = order[launcher.stdin.write(order) :]
            said = launcher.stdout.read().decode(errors="replace").strip().splitlines()
        finally:
            running.discard(launcher)
            launcher.kill()
    try:
        answer = json.loads(said[-1])
    except (IndexError, ValueError):
        answer = {"error": said[-1] if said else f"the launcher ended without a word (status {launcher.returncode})"}
    if "reason" not in answer:
        raise RuntimeError(f"no sandbox could be made: {answer['error']}")
    return Verdict(answer["reason"] == "passed", answer["reason"])
