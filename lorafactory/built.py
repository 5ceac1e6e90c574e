"""Models made on the spot, saved once into the cache as a hub repository would be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import write_folder
from .errors import UserError
from .files import lock
from .sources import cache_dir, quiet


def build(name: str, write: Callable[[Path], Any]) -> Path:
    """The folder of a model, filled by write(folder) unless it is there; of two processes one makes it, the other
    waits. name: changes with whatever write() makes. Raises UserError where the cache cannot be written."""
    import tokenizers
    import torch
    import transformers

    versions = "-".join(m.__version__ for m in (torch, transformers, tokenizers))
    place = cache_dir() / f"{name}-{versions}"
    if place.is_dir():
        return place
    try:
        with lock(place), quiet():
            if not place.is_dir():
                write_folder(place, write)
    except UserError as e:
        why = getattr(e.__cause__, "strerror", None) or e
        raise UserError(f"cannot write the cache {place}: {why}; set LORAFACTORY_CACHE to another folder") from e
    return place
