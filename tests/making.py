"""A sweep in a process that is forked for it, and a log of which run it is at."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any


def sweep(overrides: list[str], log: Path) -> None:
    """`lorafactory run -m`; log gets a line when a run begins to be made, and one when it no longer is."""
    from lorafactory import environment, run
    from lorafactory.cli import main

    made = run._make

    def noted(config: Any, id: str, *rest: Any) -> Any:
        out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(out, f"{time.monotonic_ns()} {os.getpid()} {id} begins\n".encode())
        try:
            return made(config, id, *rest)
        finally:
            os.write(out, f"{time.monotonic_ns()} {os.getpid()} {id} ends\n".encode())
            os.close(out)

    run._make = noted
    environment._code = lambda: {"commit": None, "dirty": False, "source": "the tests'"}  # whatever is edited meanwhile
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    main(["run", "-m", *overrides])
