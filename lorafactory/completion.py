"""Tab completion: Hydra's own for `run`, a few words for the rest."""

from __future__ import annotations

import os
from collections.abc import Iterable

from . import registry
from .errors import UserError
from .launch import on_hydra

SCRIPT = """_lorafactory() {
  local IFS=$'\\n'
  COMPREPLY=($(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" lorafactory completion query 2>/dev/null))
}
complete -o nospace -o default -F _lorafactory lorafactory"""


def completion(arguments: list[str]) -> int:
    """Print the completion script of a shell, or, called by it, the completions of COMP_LINE."""
    if arguments == ["query"]:
        return _complete(os.environ.get("COMP_LINE", ""))
    scripts = {"bash": SCRIPT, "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{SCRIPT}"}
    if len(arguments) != 1 or arguments[0] not in scripts:
        raise UserError(f"completion takes one shell, {' or '.join(scripts)}; not {' '.join(arguments) or 'nothing'!r}")
    print(scripts[arguments[0]])
    return 0


def _complete(line: str) -> int:
    from .cli import commands  # which imports this module

    words = line.split()
    typed = "" if line.endswith(" ") or len(words) < 2 else words[-1]
    if len(words) - bool(typed) < 2:
        names: Iterable[str] = commands()
    elif words[1] == "run":
        os.environ["COMP_LINE"] = "lorafactory " + line.partition("run")[2].lstrip()
        on_hydra(["--shell-completion", "query=bash"])
        return 0
    elif words[1] == "show":
        names = registry.names()
    else:
        names = ()
    print("\n".join(n for n in names if n.startswith(typed)))
    return 0
