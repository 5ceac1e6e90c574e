"""What a run leaves: one JSON file, written whole and read many times, its raw predictions beside it.

    <results>/runs/<experiment>/<variant>/<task>-<model>-s<seed>-<id>.json      committed
    <results>/scratch/<experiment>/...                                          failed runs and those of changed code
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .environment import environment
from .errors import UserError
from .files import lock, tidy, write_whole
from .plain import finite, flat, short

__all__ = ["environment", "find", "is_scratch", "lock", "path_of", "read", "read_all", "read_predictions", "run_id",
           "settings", "write"]

log = logging.getLogger(__name__)

SCHEMA = 1
# Settings that change no number of a run, or its last digits as another machine does, as dotted keys; whatever lies under
# one is left out with it. A source (of data, of a base) stays in: another source is another run, and the fingerprints in
# the record say what it held.
EXCLUDED = ("results", "wandb", "kernels", "train.checkpoint_every", "train.shard")
STATUSES = ("ok", "diverged", "failed")
ALWAYS: dict[str, type] = {"schema": int, "id": str, "status": str, "experiment": str, "variant": str, "task": str,
          "model": str, "seed": int, "config": dict, "command": str, "environment": dict}  # fmt: skip
WHEN_OK: dict[str, type] = {"metrics": dict, "cost": dict, "curve": list, "adapted": list, "targets": dict,
                            "data": dict, "base": dict, "optimizer": dict}  # fmt: skip


def run_id(config: Mapping[str, Any]) -> str:
    """12 hex digits that name a run: equal for equal settings, however they were typed (1e-3, 0.001) or ordered."""
    text = json.dumps(settings(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What can change a number of the run, as {dotted key: value}."""
    return flat(config, EXCLUDED)


def path_of(results: str | Path, experiment: str, variant: str, task: str, model: str, seed: int, id: str,
            scratch: bool = False) -> Path:  # fmt: skip
    """Where the record lies. Raises UserError for a name that cannot be part of a path."""
    for what, name in (("experiment", experiment), ("variant", variant), ("task", task), ("model", model)):
        if not re.fullmatch(r"\w[\w.+=,-]*", name):
            raise UserError(f"{what} {name!r} cannot name a folder: use letters, digits and any of _ . + = , -")
    place = "scratch" if scratch else "runs"
    return Path(results) / place / experiment / variant / f"{task}-{model}-s{seed}-{id}.json"


def is_scratch(record: Mapping[str, Any]) -> bool:
    """Whether it belongs in scratch: a failed run, or one of code that no commit names."""
    return record["status"] == "failed" or bool(record["environment"].get("dirty"))


def find(results: str | Path, experiment: str, variant: str, task: str, model: str, seed: int, id: str) -> Path | None:
    """The finished run of this id, committed or else in scratch; None: it is still to be made.

    A failed run is made again, and so are an unreadable record and a scratch one of other code than the present.
    """
    for scratch in (False, True):
        path = path_of(results, experiment, variant, task, model, seed, id, scratch)
        if not path.exists():
            continue
        try:
            record = read(path)
        except UserError as error:
            log.warning("%s; the run is made again", error)
            continue
        stale = scratch and record["environment"].get("source") != environment()["source"]
        if record["status"] != "failed" and not stale:
            return path
    return None


def write(path: Path, record: Mapping[str, Any], predictions: Mapping[str, Any] | None = None) -> None:
    """Predictions first, the record last, so a record on disk is complete. NaN and infinity become null, with the
    reason under `<key>_undefined`; predictions keep the nine digits that tell every float32 from the next. Raises
    UserError for a folder that cannot be written or a record that lacks something; then nothing is left behind.
    Only who holds the run's lock may write."""
    content = finite(record)
    content["predictions"] = None
    raw = b""
    if predictions is not None:
        raw = json.dumps(short(finite(predictions)), allow_nan=False, separators=(",", ":")).encode()
        content["predictions"] = {"file": _beside(path).name, "sha256": hashlib.sha256(raw).hexdigest()}
    _check(content, path)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    tidy(path.parent, f".{path.stem}.*.tmp")
    with suppress(OSError):
        path.unlink()  # one that this run replaces: it must not stand beside predictions of another
    try:
        if predictions is not None:
            write_whole(_beside(path), gzip.compress(raw, mtime=0))
        write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())  # a section a line: short, and its diffs too
    except UserError:
        _beside(path).unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Any]:
    """The record, checked. Raises UserError naming the file and what is wrong with it."""
    try:
        record = json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise UserError(f"cannot read record {path}: {error.strerror}") from error
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise UserError(f"record {path} is broken: {error}") from error
    _check(record, path)
    return record


def read_all(folder: Path) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Every record under `folder`, by path, in order, and a line for each file that had to be left out."""
    records, broken = {}, []
    for path in sorted(folder.rglob("*.json")):
        if path.name.startswith("."):
            continue
        try:
            records[path] = read(path)
        except UserError as error:
            broken.append(str(error))
    return records, broken


def read_predictions(path: Path) -> dict[str, Any]:
    """The raw predictions of the record at `path`. Raises UserError if they are not the ones that it was made of."""
    said = read(path)["predictions"]
    if said is None:
        raise UserError(f"record {path} has no predictions")
    try:
        raw = gzip.decompress(_beside(path).read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read predictions {_beside(path)}: {error}") from error
    if hashlib.sha256(raw).hexdigest() != said["sha256"]:
        raise UserError(f"predictions {_beside(path)} are not those of its record")
    return json.loads(raw)


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which JSON does not know")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.predictions.json.gz")


def _check(record: Any, path: Path) -> None:
    if not isinstance(record, dict) or "schema" not in record:
        raise UserError(f"{path} is no record: it has no schema")
    if record["schema"] != SCHEMA:
        raise UserError(f"record {path} has schema {record['schema']!r}; this lorafactory reads {SCHEMA}")
    wanted = ALWAYS | (WHEN_OK if record.get("status") == "ok" else {"reason": str})
    for key, kind in wanted.items():
        if not isinstance(record.get(key), kind):
            raise UserError(f"record {path}: {key} must be of type {kind.__name__}, not {record.get(key)!r:.60}")
    if record["status"] not in STATUSES:
        raise UserError(f"record {path}: status {record['status']!r} is none of {', '.join(STATUSES)}")
    if not path.stem.endswith(record["id"]):
        raise UserError(f"record {path} carries the id {record['id']!r}, which is not its name's")
    missing = {"primary", "selection", "test"} - set(record.get("metrics", ())) if record["status"] == "ok" else None
    if missing:
        raise UserError(f"record {path}: metrics lack {', '.join(sorted(missing))}")
