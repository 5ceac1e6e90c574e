"""`lorafactory run`: plain Hydra, its errors in one line, and a sweep's last lines."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from . import config as configs
from . import paths, registry
from .errors import UserError
from .files import write_whole

_ended: dict[str, Any] = {}  # of this process: the single run's outcome or error, or the sweep's folder
WORST = -math.inf  # what a sweeper that searches hears of a run that failed or diverged


def run(arguments: list[str]) -> int:
    """Exit status: 0; 1 where a run diverged or one of a sweep failed. Raises UserError for a mistake."""
    _ended.clear()
    early = ""
    try:
        on_hydra(arguments)
    except UserError:
        raise
    except Exception as e:
        if "folder" not in _ended:
            raise
        said = " ".join(str(e).split())[-200:]
        early = f"the launcher gave up, {type(e).__name__}: {said}; the same command makes the runs that are missing"
    if "error" in _ended:
        raise _ended["error"]
    if "folder" in _ended:
        return _summary(_ended["folder"], early)
    return 1 if _ended.get("status") == "diverged" else 0


def on_hydra(arguments: list[str]) -> None:
    configs.publish()
    # the Optuna sweeper was written for an older Optuna: nothing that a user could act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="optuna|hydra_plugins")
    before, sys.argv = sys.argv, ["lorafactory", *_postponed(arguments)]
    full_error, os.environ["HYDRA_FULL_ERROR"] = os.environ.get("HYDRA_FULL_ERROR"), "1"  # errors come to us, unprinted
    try:
        hydra.main(version_base="1.3", config_path=str(paths.configs()), config_name="config")(_job)()
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(_one_line(e)) from e
    except BrokenPipeError:  # `| head`: whoever read the output has seen enough
        raise
    except OSError as e:
        raise UserError(f"cannot write {e.filename}: {e.strerror}; name a folder that can be written (results.folder=DIR)") from e
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _postponed(arguments: list[str]) -> list[str]:
    """In a sweep over variants, options of the variant wait until each job has its own. Hydra composes once before the
    jobs, with the default variant and every override that is not swept; one of a single value counts as swept."""
    if not {"-m", "--multirun"} & set(arguments):
        return arguments
    parser = OverridesParser.create()

    def wait(argument: str) -> str:
        key, is_override, value = argument.partition("=")
        if not is_override or not key.startswith("variant.") or parser.parse_override(argument).is_sweep_override():
            return argument
        return f"{key}=choice({value})"

    return [wait(a) for a in arguments]


def _job(cfg: Any) -> float | None:
    """One run, in whatever process Hydra's launcher chose. Returns what a sweeper maximises: the score on selection."""
    job = HydraConfig.get()
    folder, sweep = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    overrides = [o for o in job.overrides.task if not o.startswith("results.folder=")]
    label = " ".join(overrides) or "defaults"
    if sweep:
        _outcome(folder, label, "lost", "its process ended without a word (killed, or out of memory?)", folder)
    try:
        from .run import run

        made = run(configs.load(cfg), shlex.join(["lorafactory", "run", *overrides]))
    except Exception as e:  # a sweep goes on; a single run's error is raised again once Hydra is out of the way
        if not sweep:
            _ended["error"] = e
            return None
        write_whole(folder / "traceback.txt", traceback.format_exc().encode())
        line = " ".join(str(e).split()) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        _outcome(folder, label, "failed", line, folder / "traceback.txt")
        show(f"failed    {label}: {line}")
        return WORST
    metrics = made.record["metrics"]
    primary = metrics["primary"]
    score = metrics["test"].get(primary)
    shown = "undefined" if score is None else f"{score:.4f}"
    status = made.record["status"] if made.status == "found" else made.status
    if sweep:
        _outcome(folder, label, made.status if status != "diverged" else status, made.record.get("reason", ""), made.path)
        show(f"{made.status:9} {label}: {primary} {shown} ({made.record['cost']['seconds']:.1f} s)")
    else:
        _ended["status"] = status
        if status == "diverged":
            show(f"diverged: {made.record['reason']}")
        show(f"{primary} on test: {shown}{' (found, not run again)' if made.status == 'found' else ''}")
        show(f"record: {made.path}")
    score = metrics["selection"].get(metrics.get("selects", primary))
    return WORST if score is None else score


def show(*lines: str) -> None:
    """Under torchrun one process speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)


def _outcome(folder: Path, label: str, status: str, reason: str, path: Path) -> None:
    text = {"label": label, "status": status, "reason": reason, "path": str(path)}
    write_whole(folder / "outcome.json", json.dumps(text).encode())


class Summary(Callback):
    """Hydra's callback: where the jobs of a sweep leave how they ended."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        _ended["folder"] = Path(config.hydra.sweep.dir)
        _ended["folder"].mkdir(parents=True, exist_ok=True)  # a sweeper may keep a file of its own in scratch


def _summary(folder: Path, early: str) -> int:
    """The last lines of a sweep, and its exit status. Outcomes are files, for a launcher may run jobs anywhere."""
    found = sorted(folder.rglob("outcome.json"), key=lambda p: (len(p.parent.name), p.parent.name))
    ends = [json.loads(p.read_text()) for p in found]
    counts = Counter(e["status"] for e in ends)
    lost = f", {counts['lost']} lost" if counts["lost"] else ""
    bad = [e for e in ends if e["status"] not in ("ok", "found")]
    show(
        f"{counts['ok']} ran, {counts['found']} found, {counts['failed']} failed, {counts['diverged']} diverged{lost}",
        *(f"  {e['status']}: {e['label']}: {e['reason']} ({e['path']})" for e in bad),
        *([f"  {early}"] if early else []),
    )
    return 1 if bad or early else 0


def _one_line(error: BaseException) -> str:
    """What Hydra and OmegaConf say, with the nearest names."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [o for o in error.options or () if o != "kind"]
        return f"no {group or 'config'} {name!r}; {registry.nearest(name, options) if options else 'there are none'}"
    cause = next((c for c in _causes(error) if isinstance(c, OmegaConfBaseException) and c.key is not None), None)
    known = getattr(getattr(cause, "object_type", None), "__dataclass_fields__", None)
    if cause is not None and known and cause.key not in known:
        return f"no option {cause.full_key or cause.key!r}; {registry.nearest(str(cause.key), known)}"
    first = _causes(error)[-1] if isinstance(_causes(error)[-1], UserError) else error
    text = [line.strip() for line in str(first).splitlines() if line.strip() and not line.startswith("    ")]
    detail = str(cause).splitlines()[0] if cause is not None else ""
    return text[0] if not detail or detail in text[0] else f"{text[0]} {detail}"


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return chain
