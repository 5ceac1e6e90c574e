"""Class labels by name: which names there are, in which order, and each row's number among them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import UserError
from .reading import Raw

UNLABELLED = "; -1 marks rows without a label: score on a split that has them, as task.test_split=validation"


def names(train: Raw, chosen: list[str], source: str) -> list[str]:
    """The classes in order: the source's own, else `chosen`, else sorted over the training split (numbers as numbers).

    Raises UserError where two of these contradict each other."""
    if train.names and chosen and train.names != chosen:
        raise UserError(f"task.labels={chosen}, but the order of {source} is its own: {train.names}; leave labels out")
    found = train.names or chosen or sorted(set(_named(train, chosen)), key=_natural)
    if len(found) < 2:
        raise UserError(f"the training split of {source} has {len(found)} class; two or more are needed")
    return list(found)


def numbers(raw: Raw, classes: list[str], chosen: list[str]) -> np.ndarray:
    """[rows] each row's place in `classes`. Raises UserError naming the first row that has none."""
    if raw.names and raw.names != classes:
        raise UserError(f"{raw.places[0]} is among the classes {raw.names}, but train is among {classes}")
    place = {n: i for i, n in enumerate(classes)}
    named = _named(raw, chosen)
    for i, name in enumerate(named):
        if name not in place:
            raise UserError(f"{raw.places[i]}: label {name!r} is not among the classes {', '.join(classes)}")
    return np.array([place[n] for n in named])


def _named(raw: Raw, chosen: list[str]) -> list[str]:
    """Each row's class name; a number counts into the source's names or `chosen`, or is its own name."""
    known = raw.names or chosen
    found = []
    for i, label in enumerate(raw.labels):
        if isinstance(label, str) and label:
            found.append(label)
        elif isinstance(label, int) and label >= 0 and (not known or label < len(known)):
            found.append(known[label] if known else str(label))
        else:
            wanted = f"0..{len(known) - 1}" if known else "a name or a number from 0"
            raise UserError(f"{raw.places[i]}: label {label!r} is not {wanted}{UNLABELLED if label == -1 else ''}")
    return found


def _natural(name: str) -> tuple[Any, ...]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
