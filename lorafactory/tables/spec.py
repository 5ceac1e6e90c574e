"""What a table is to show: YAML under configs/table, read into a Spec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import paths
from ..errors import UserError
from ..registry import nearest


@dataclass(frozen=True)
class TaskColumn:
    """The test score of one task; metric "primary": the task's own."""

    task: str
    metric: str = "primary"
    label: str = ""


@dataclass(frozen=True)
class Select:
    """Per row and task, the point of `over` (settings such as train.lr) whose mean of the metric `by` on the selection
    split is the highest (mode max) or lowest (min). seeds: those of the mean; (): all that the table expects."""

    over: tuple[str, ...] = ()
    by: str = "primary"
    mode: str = "max"
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spec:
    """experiments: folders of records. rows: variants in order, or () for all there are. split: settings that divide a
    variant into several rows. seeds: the expected ones, or how many; 0: as many as the fullest cell has. bold: the
    level of the paired test, 0 for none. scale, digits: how scores are shown. where: {setting: value} that a record
    must have. allow_mixed: what may differ within the table (see fair.py)."""

    name: str
    experiments: tuple[str, ...]
    tasks: tuple[TaskColumn, ...]
    caption: str = ""
    model: str = ""
    rows: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    select: Select = Select()
    seeds: int | tuple[int, ...] = 0
    mean: bool = True
    bold: float = 0.05
    scale: float = 100.0
    digits: int = 1
    where: tuple[tuple[str, Any], ...] = ()
    allow_mixed: tuple[str, ...] = ()
    plot: str = "adapter_parameters"

    def settings(self) -> tuple[str, ...]:
        """Settings that differ within a column by intention."""
        return (*self.select.over, *self.split, "seed")


def available() -> dict[str, Path]:
    return {path.stem: path for path in sorted((paths.configs() / "table").glob("*.yaml"))}


def load(name: str | Path) -> Spec:
    """The spec of that name under configs/table, or the file at that path. Raises UserError if it is wrong."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = available()
        if str(name) not in known:
            raise UserError(f"no table {str(name)!r}; {nearest(str(name), known)} (or give the path of a .yaml file)")
        path = known[str(name)]
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)  # knows 1e-3 for a number, unlike yaml
    except OSError as error:
        raise UserError(f"cannot read table spec {path}: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"table spec {path} is no YAML: {' '.join(str(error).split())}") from error
    return parse(path.stem, content)


def parse(name: str, content: Any) -> Spec:
    where = f"table {name}"
    if not isinstance(content, dict):
        raise UserError(f"{where}: a spec is a mapping with experiments, tasks, …")
    known = set(Spec.__dataclass_fields__) - {"name"}
    _known(content, known, where)
    given = {key: _typed(key, value, where) for key, value in content.items()}
    for key in ("experiments", "tasks"):
        if not given.get(key):
            raise UserError(f"{where}: {key} is missing; name at least one")
    repeated = [t.label for t in given["tasks"]]
    if len(set(repeated)) < len(repeated):
        raise UserError(f"{where}: two columns are called {max(repeated, key=repeated.count)!r}; give each its label")
    return Spec(name=name, **given)


def _typed(key: str, value: Any, where: str) -> Any:
    where = f"{where}: {key}"
    if key in ("experiments", "rows", "split", "costs", "allow_mixed"):
        return () if key == "rows" and value == "all" else _names(value, where)
    if key == "tasks":
        return tuple(_task(item, where) for item in _listed(value))
    if key == "select":
        return _select(value, where)
    if key == "seeds" and isinstance(value, list):
        return _seeds(value, where)
    if key == "where":
        return tuple(sorted(_mapping(value, where).items()))
    if value is False and key in ("bold", "plot"):
        return 0.0 if key == "bold" else ""
    if key in ("seeds", "digits", "bold", "scale"):
        return _number(key, value, where)
    kind = bool if key == "mean" else str
    if not isinstance(value, kind):
        raise UserError(f"{where} is {value!r}; it takes {'true or false' if kind is bool else 'text'}")
    return value


def _number(key: str, value: Any, where: str) -> int | float:
    whole = key in ("seeds", "digits")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise UserError(f"{where} is {value!r}; it takes a {'whole ' * whole}number")
    if value < 0 or (key == "bold" and value >= 1) or (key == "scale" and value == 0):
        raise UserError(f"{where} is {value!r}, which is out of range")
    return value


def _task(item: Any, where: str) -> TaskColumn:
    if isinstance(item, str):
        item = {"task": item}
    item = _mapping(item, where)
    _known(item, TaskColumn.__dataclass_fields__, where)
    if not item.get("task") or not all(isinstance(value, str) for value in item.values()):
        raise UserError(f"{where}: {item} must name a task, and its metric and label are text")
    return TaskColumn(**{"label": item["task"], **item})


def _select(value: Any, where: str) -> Select:
    value = _mapping(value, where)
    _known(value, Select.__dataclass_fields__, where)
    made = Select(
        over=_names(value.get("over", []), f"{where}.over"),
        by=value.get("by", "primary"),
        mode=value.get("mode", "max"),
        seeds=_seeds(value.get("seeds", []), f"{where}.seeds"),
    )
    if made.mode not in ("max", "min") or not isinstance(made.by, str):
        raise UserError(f"{where}: by names a metric and mode is max or min, not {made.by!r} and {made.mode!r}")
    return made


def _names(value: Any, where: str) -> tuple[str, ...]:
    values = _listed(value)
    if not all(isinstance(item, str) and item for item in values) or len(set(values)) < len(values):
        raise UserError(f"{where} is {value!r}; it takes names, each once")
    return tuple(values)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    values = _listed(value)
    if not all(type(item) is int for item in values) or len(set(values)) < len(values):
        raise UserError(f"{where} is {value!r}; it takes whole numbers, each once")
    return tuple(values)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; it takes a mapping")
    return value


def _known(content: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{where} has no key {key!r}; {nearest(str(key), known)}")
