"""Where the repository lies, and what its documents show."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str = "") -> list[str]:
    """The fenced blocks of a document, in order; language "": those of command lines."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text(name), re.M | re.S)
    return [body for kind, body in found if kind == language]


def commands(name: str, program: str) -> list[str]:
    """What follows `program` where a document shows a command line, comments left out."""
    lines = "\n".join(blocks(name)).splitlines() + re.findall(r"`([^`\n]+)`", text(name))
    return [s.partition("  #")[0].strip().removeprefix(f"{program} ") for s in lines if s.startswith(f"{program} ")]
