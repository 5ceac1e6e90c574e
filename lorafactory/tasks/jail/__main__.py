"""sandbox.py's launcher: what a fresh interpreter runs, once a program. It knows nothing of lorafactory.

    caller ── launcher ─┬─ init, pid 1 of the new namespaces ── the program, pid 2 ── whatever that starts
                        └─ ends init in time, which ends all that came after it

Init shuts itself in (walls.py) and only then forks the program. The launcher reads one order (a line of JSON) from
stdin and answers with one line; it also ends everything where stdin closes, for then the caller is gone. Init dies
with the launcher.

What the program reaches of all this is one end of a pipe. The first message there is a token of its process, drawn
before its first line runs; only a message that repeats the token counts, and none but the first.
"""

from __future__ import annotations

import builtins
import json
import os
import select
import signal
import sys
import types
from typing import Any, NoReturn

from . import walls

sys.path.pop(0)  # the folder that this package lies in is not the program's

FIRST_USER = 1_900_000_000  # real root becomes this user plus its process number: nobody's, and a count of its own
SETUP_SECONDS = 60.0


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    try:
        answer = _supervise(order)
    except Exception as e:
        answer = {"error": f"{e}"}
    print(json.dumps(answer))


def _supervise(order: dict[str, Any]) -> dict[str, str]:
    root, user, group, proc = os.geteuid() == 0, os.geteuid(), os.getegid(), os.open("/proc", os.O_PATH)
    if root:
        user = group = FIRST_USER + os.getpid()
    else:
        walls.own_users(proc, user, group)
    walls.leave_the_system(proc)
    order["processes"] += 1 if root else 2  # init counts as the program's user; in a user namespace, the launcher too
    ears, mouth = os.pipe()
    init = os.fork()
    if not init:
        _init(order, mouth, proc, root, user, group)
    os.close(mouth)
    try:
        if _hear(ears, 1, SETUP_SECONDS) != b"+":
            return {"error": (_hear(ears, 4096, 1) or b"init ended or hung").decode(errors="replace")}
        token = _hear(ears, 16, SETUP_SECONDS) or b""
        heard = _hear(ears, 4096, order["seconds"])
    finally:
        os.kill(init, signal.SIGKILL)
        status = os.waitpid(init, 0)[1]  # returns when all of its namespace is gone
    return {"reason": _line(_reason(token, heard, status))}


def _hear(ears: int, size: int, seconds: float) -> bytes | None:
    """At most `size` bytes; b"" where everyone who could speak is gone; None where time is."""
    poll = select.poll()
    poll.register(ears, select.POLLIN)
    poll.register(0, select.POLLIN)
    events = dict(poll.poll(seconds * 1000))
    if 0 in events:
        raise EOFError("the caller is gone")
    return os.read(ears, size) if events else None


def _reason(token: bytes, heard: bytes | None, status: int) -> str:
    if heard is None:
        return "timeout"
    if heard:
        told = heard.startswith(token)
        return heard[len(token) :].decode(errors="replace") if told else "failed: wrote into the runner's pipe"
    fatal = os.WEXITSTATUS(status) if os.WIFEXITED(status) else os.WTERMSIG(status)
    if fatal == signal.SIGXCPU:
        return "timeout"
    return f"failed: ended by signal {fatal} ({signal.strsignal(fatal)})" if fatal else "exited before the tests ended"


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200].rstrip(": ")


def _init(order: dict[str, Any], mouth: int, proc: int, root: bool, user: int, group: int) -> NoReturn:
    """Pid 1: shuts the door, starts the program, collects the dead, and ends with the program's signal or 0."""
    try:
        os.setsid()  # else the program could signal the launcher, as one of its group
        walls.write(proc, "self/oom_score_adj", "1000")  # where memory runs out nevertheless, these go first
        walls.shut(order["file_bytes"], user, group)
        walls.drop(proc, root, user, group)
        null = os.open("/dev/null", os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        os.closerange(3, mouth)
        os.closerange(mouth + 1, 64)
        program = os.fork()
    except BaseException as e:
        try:
            os.write(mouth, b"-" + f"{e}".encode(errors="replace"))
        finally:
            os._exit(0)
    if not program:
        _program(order, mouth)
    while True:
        ended, status = os.wait()
        if ended == program:
            os._exit(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


def _program(order: dict[str, Any], mouth: int) -> NoReturn:
    """Pid 2. What is called after the program has run is bound before it, so that it cannot be replaced; the token
    lies on the interpreter's stack meanwhile, in no variable of any frame."""
    write, number, me, leave = os.write, os.getpid, os.getpid(), os._exit
    try:
        walls.limit(order)
        os.environ.clear()
        vars(builtins).update(exit=sys.exit, quit=sys.exit)  # what `site` would bring
        token = [os.urandom(16)]
        write(mouth, b"+" + token[0])
        proof = token.pop() + _outcome(order.pop("program"))
        if number() == me:  # a fork of the program that comes to the end is not the program
            write(mouth, proof)
    finally:
        leave(0)


def _outcome(source: str) -> bytes:
    memory, leaving, anything = MemoryError, SystemExit, BaseException
    try:  # a module of its own, not __main__: as in the HumanEval paper's runner, a script's main part does not run
        module = sys.modules["program"] = types.ModuleType("program")
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    except memory:
        return b"out of memory"
    except leaving:
        return b"exited before the tests ended"
    except anything as e:
        try:
            return f"failed: {e.__class__.__name__!s:.100}: {e!s:.500}".encode(errors="replace")
        except anything:
            return b"failed: an exception that cannot be shown"
    return b"passed"


if __name__ == "__main__":
    main()
