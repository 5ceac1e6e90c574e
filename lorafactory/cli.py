"""The command line. A user's mistake is one line and exit status 2; --debug, or LORAFACTORY_DEBUG=1, shows where."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from .errors import UserError
from .version import __version__

HELP = f"""lorafactory {__version__}: compare LoRA variants and believe the answer

  lorafactory run [OVERRIDE …]        one run: variant=dora task=cola model=minilm train.lr=1e-3 seed=0
  lorafactory run -m [OVERRIDE …]     a sweep: variant=lora,dora+pissa variant.rank=4,8 seed=0,1,2
  lorafactory variants [--json]       every registered name: axis, paper, one line
  lorafactory show NAME [--model M]   a variant's equation, options and cost
  lorafactory targets MODEL           what of a model can be adapted
  lorafactory table SPEC              a table from records alone
  lorafactory export RECORD|FOLDER --format peft|lora|merged --out DIR   an adapter for PEFT or plain transformers
  lorafactory completion bash|zsh        a script for tab completion: eval "$(lorafactory completion bash)"

`lorafactory run --help` shows models, tasks and options; `lorafactory run --cfg job` the composed config.
Exit status: 0, 1 a run failed or diverged, 2 a mistake in the command, 130 stopped by Ctrl-C.
"""


def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("LORAFACTORY_DEBUG"))
    if "--debug" in arguments:
        debug = True
        arguments.remove("--debug")
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        sys.exit(_dispatch(arguments))
    except UserError as e:
        if debug:
            raise
        print(f"lorafactory: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(f"\nlorafactory: {str(e) or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    found = commands().get(command)
    if found is None:
        from .registry import nearest

        raise UserError(f"no command {command!r}; {nearest(command, commands())}")
    return found(rest)


def commands() -> dict[str, Callable[[list[str]], int]]:
    """Each imports what it needs: `lorafactory --help` is not to wait for torch."""

    def run(rest: list[str]) -> int:
        from .launch import run

        return run(rest)

    def table(rest: list[str]) -> int:
        from .tables import main

        return main(rest) or 0

    def listing(name: str) -> Callable[[list[str]], int]:
        def call(rest: list[str]) -> int:
            from . import describe

            return getattr(describe, name)(rest)

        return call

    def completion(rest: list[str]) -> int:
        from .completion import completion

        return completion(rest)

    def export(rest: list[str]) -> int:
        from .export import main

        return main(rest)

    found = {"run": run, "table": table, "export": export, "completion": completion}
    return found | {n: listing(n) for n in ("variants", "show", "targets")}
