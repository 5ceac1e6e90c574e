"""What every benchmark ends with: a user's mistake in one line, exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lorafactory.errors import UserError


def said(script: str, arguments: list[str]) -> str:
    """The command, less the folder that one machine wrote to."""
    at = arguments.index("--out") if "--out" in arguments else len(arguments)
    return " ".join([f"python scripts/bench/{script}.py", *arguments[:at], *arguments[at + 2 :]])


def call(main: Callable[[list[str]], int]) -> None:
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
