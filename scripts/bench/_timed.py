"""`lorafactory run …` that writes, as JSON, the seconds that it spent in training, in evaluation and in all.

    python scripts/bench/_timed.py OUT.json run -m …"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

from lorafactory import run, train  # noqa: E402
from lorafactory.cli import main  # noqa: E402

spent = {"train": 0.0, "evaluate": 0.0}


def timed(kind: str, call: Callable) -> Callable:
    def inner(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent[kind] += time.perf_counter() - began

    return inner


if __name__ == "__main__":
    train.Trainer.train = timed("train", train.Trainer.train)  # type: ignore[method-assign]
    run._score = timed("evaluate", run._score)
    imported = time.perf_counter() - BEGAN
    try:
        main(sys.argv[2:])
    finally:
        whole = {**spent, "imports": imported, "total": time.perf_counter() - BEGAN}
        Path(sys.argv[1]).write_text(json.dumps(whole))
