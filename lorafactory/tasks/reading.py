"""Raw classification data from anything that `datasets` reads, or from folders of text files by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..registry import nearest
from ..sources import cache_dir, locate, reading

LAYOUT = (
    "a folder with train.csv, .json or .parquet (and test.csv, … beside it), or with a folder a class of .txt files "
    "(under train/ and test/ if it is split)"
)
TABLES = (".csv", ".json", ".jsonl", ".parquet")


@dataclass
class Raw:
    """One split as its source has it. names: the classes in the source's own order, where it gives one. places: what
    an error calls a row. recoded: files that were not UTF-8 and were read as Windows-1252."""

    inputs: Sequence[Any]
    labels: list[Any]
    places: Sequence[str]
    names: list[str] | None = None
    recoded: list[str] = field(default_factory=list)


def read(source: str, subset: str, revision: str | None, text: list[str], label: str) -> dict[str, Raw]:
    """split -> rows. Raises UserError for a missing source, split file, or column."""
    where = locate(source, "task.source", LAYOUT)
    if isinstance(where, Path) and not any(f.suffix in TABLES for f in where.rglob("*")):
        if any(where.glob("train/*/*.txt")):
            return {d.name: _class_folders(d) for d in sorted(where.iterdir()) if d.is_dir()}
        if any(where.glob("*/*.txt")):
            return {"train": _class_folders(where)}
    found = tables(where, subset, revision, LAYOUT)
    return {split: _rows(data, split, text, label) for split, data in found.items()}


def tables(where: Path | str, subset: str, revision: str | None, layout: str, option: str = "task.source") -> dict[str, Any]:
    """split -> datasets.Dataset of a place that sources.locate() found. Raises UserError for what does not load."""
    import datasets

    with reading(str(where), option, layout):
        if isinstance(where, str):
            return datasets.load_dataset(where, subset or None, revision=revision)
        if subset and (where / subset).is_dir():  # a hub repository's folder, with or without the README that maps it
            where, subset = where / subset, ""
        return datasets.load_dataset(str(where.resolve()), subset or None, cache_dir=str(cache_dir() / "datasets"))


def _rows(data: Any, split: str, text: list[str], label: str) -> Raw:
    require(data, split, [("task.text", t) for t in text] + [("task.label", label)])
    columns = [texts(data, split, t) for t in text]
    return Raw(list(zip(*columns, strict=True)), data[label][:], Places(split, len(data)), class_names(data, label))


def texts(data: Any, split: str, column: str) -> list[str]:
    """A column's values. Raises UserError for one that is no text."""
    values = data[column][:]
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{split} row {i}: column {column!r} holds {value!r}, not text")
    return values


def require(data: Any, split: str, columns: list[tuple[str, str]]) -> None:
    """columns: (option, the column that it names). Raises UserError for one that is not there."""
    for option, column in columns:
        if column not in data.column_names:
            near = nearest(column, data.column_names)
            raise UserError(f"{option}: no column {column!r} in the {split} split; {near}")


def class_names(data: Any, label: str) -> list[str] | None:
    """The classes of a label column in its own order, where it has one."""
    return getattr(data.features[label], "names", None)


class Places(Sequence):
    """'train row 0', 'train row 1', …"""

    def __init__(self, split: str, size: int):
        self.split, self.size = split, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.size:
            raise IndexError(i)  # which ends an iteration
        return f"{self.split} row {i}"


def _class_folders(folder: Path) -> Raw:
    files = [f for d in sorted(folder.iterdir()) if d.is_dir() for f in sorted(d.glob("*.txt"))]
    texts, recoded = [], []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as e:
            raise UserError(f"cannot read {file}: {e.strerror}") from e
        try:
            texts.append((content.decode("utf-8"),))
        except UnicodeDecodeError:
            texts.append((content.decode("cp1252", errors="replace"),))
            recoded.append(str(file.relative_to(folder)))
    places = [str(f.relative_to(folder.parent)) for f in files]
    return Raw(texts, [f.parent.name for f in files], places, None, recoded)
