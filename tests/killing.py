"""Runs in processes that die at a chosen moment: the n-th line of lorafactory's own code that they come to.

A server imports everything once and forks a process for each run, so a kill costs a run and not a start of Python:

    with Server() as server:
        moments = server.run(arguments, traced=True).moments      # {module: [n, …]} of a whole life
        assert server.run(arguments, kill_at=n).status == -9
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = str(Path(__file__).resolve().parents[1] / "lorafactory")


@dataclass
class Ended:
    """status: as subprocess has it; moments: the lines that each module ran, counted over the process; said: stdout and
    stderr."""

    status: int
    said: str
    moments: dict[str, list[int]] = field(default_factory=dict)


# What a third of the kills each hits: anything, a write (a checkpoint, the record, their locks), an evaluation.
AIMS = ((), ("checkpoint", "files", "record", "resume"), ("evaluate", "metrics"))


def draw(moments: dict[str, list[int]], count: int, seed: str) -> list[int]:
    """Random moments of a life. A third falls on any line; writing and evaluating are few lines, so they get the same."""
    chance = random.Random(seed)
    aims = [[n for m, lines in moments.items() if m in aim or not aim for n in lines] for aim in AIMS]
    return [chance.choice(aims[k % len(aims)]) for k in range(count)]


class Server:
    def __enter__(self) -> Server:
        from runs import environment

        command = [sys.executable, str(Path(__file__).resolve())]
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, arguments: list[str], kill_at: int = 0, traced: bool = False) -> Ended:
        asked = {"arguments": arguments, "kill_at": kill_at, "traced": traced}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


class Trace:
    """Counts the lines of lorafactory that this process comes to; dies at line kill_at, if that is not 0."""

    def __init__(self, kill_at: int):
        self.kill_at, self.count, self.moments = kill_at, 0, {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            self.moments.setdefault(Path(frame.f_code.co_filename).stem, []).append(self.count)
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def life(asked: dict[str, Any], said: int, moments: int) -> None:
    """A run's process from here to its end, in the fork."""
    from lorafactory.cli import main

    for stream in (1, 2):
        os.dup2(said, stream)
    trace = Trace(asked["kill_at"])
    if asked["kill_at"] or asked["traced"]:
        sys.settrace(trace)
    try:
        main(asked["arguments"])
    except SystemExit as e:
        sys.settrace(None)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(moments, json.dumps(trace.moments).encode()) if asked["traced"] else None
        os._exit(e.code or 0)


def serve() -> None:
    import tempfile

    import warm  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as moments:
            pid = os.fork()
            if not pid:
                try:
                    life(asked, said.fileno(), moments.fileno())
                finally:
                    os._exit(70)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said.seek(0), moments.seek(0)
            text, lines = said.read().decode(), json.loads(moments.read() or b"{}")
        print(json.dumps({"status": status, "said": text, "moments": lines}), flush=True)


if __name__ == "__main__":
    serve()
