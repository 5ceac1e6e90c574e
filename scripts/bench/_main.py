"""What every benchmark ends with: its page and numbers; a user's mistake in one line, exit status 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafactory import files
from lorafactory.errors import UserError


def said(script: str, arguments: list[str]) -> str:
    """The command, less the folder that one machine wrote to."""
    at = arguments.index("--out") if "--out" in arguments else len(arguments)
    return " ".join([f"python scripts/bench/{script}.py", *arguments[:at], *arguments[at + 2 :]])


def machine(found: dict[str, Any]) -> list[str]:
    """A page's lines of where it was measured."""
    e = found["environment"]
    return [f"- processor: {e['cpu']}, {found['threads']} thread(s); load average before {found['load']:.2f}",
            f"- matrix instructions: {' '.join(e['matrix_instructions']) or 'none'}",
            f"- torch {e['packages']['torch']}"]  # fmt: skip


def write(folder: Path, name: str, found: dict[str, Any], page: str) -> None:
    """The numbers as <name>.json, the page as <name>.md."""
    files.write_whole(folder / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())
    files.write_whole(folder / f"{name}.md", page.encode())


def call(main: Callable[[list[str]], int]) -> None:
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
