"""Tokenised rows: padding, and a cache on disk that two processes may fill at once."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import UserError
from ..files import write_whole
from ..sources import cache_dir

log = logging.getLogger(__name__)
FORMAT = "1"  # of the cache's files


class Rows(Sequence):
    """rows[i] -> {"input_ids": [...], "attention_mask": [...], ..., "labels": int}.

    columns: name -> the rows' values end to end, int32; ends [n]: where each row ends in them; single: name -> [n], one
    value a row, as its label."""

    def __init__(self, columns: dict[str, Tensor], ends: Tensor, **single: list[int]):
        self.columns, self.single, self.ends = columns, single, ends.tolist()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        start = self.ends[i - 1] if i else 0
        found: dict[str, Any] = {n: c[start : self.ends[i]].tolist() for n, c in self.columns.items()}
        return found | {n: values[i] for n, values in self.single.items()}

    def lengths(self) -> list[int]:
        return [b - a for a, b in zip([0, *self.ends[:-1]], self.ends, strict=True)]


def rows(found: dict[str, Tensor], split: str, **single: list[int]) -> Rows:
    """One split of what tokenise() made."""
    columns = {n.removeprefix(f"{split}."): t for n, t in found.items() if n.startswith(f"{split}.")}
    return Rows(columns, columns.pop("ends"), **single)


def pad(rows: list[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
    """Rows -> {name: [rows, longest] int64, "labels": [rows]}, padded on the processor's side."""
    longest = max(len(r["input_ids"]) for r in rows)
    fill = {"input_ids": processor.pad_token_id, "token_type_ids": processor.pad_token_type_id}
    left = processor.padding_side == "left"
    batch = {}
    for name in rows[0].keys() - {"labels"}:
        gaps = [[fill.get(name, 0)] * (longest - len(r[name])) for r in rows]
        batch[name] = torch.tensor([g + r[name] if left else r[name] + g for r, g in zip(rows, gaps, strict=True)])
    return batch | {"labels": torch.tensor([r["labels"] for r in rows])}


def tokenise(processor: Any, texts: dict[str, list[tuple[str, ...]]], max_length: int) -> dict[str, Tensor]:
    """`<split>.<column>` -> ids end to end (int32) and `<split>.ends` [rows]; cut to max_length tokens."""
    found = {}
    for split, rows in texts.items():
        columns = [list(c) for c in zip(*rows, strict=True)]
        for name, values in processor(*columns, truncation=True, max_length=max_length).items():
            found[f"{split}.{name}"] = torch.tensor([i for v in values for i in v], dtype=torch.int32)
            if name == "input_ids":
                found[f"{split}.ends"] = torch.tensor([len(v) for v in values]).cumsum(0)
    return found


def cached(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """make(), or what an earlier call with this key made. The file is whole or absent, so two processes that build it
    at once both end with a good one; an unreadable one is made again. Raises UserError for an unwritable cache."""
    path = cache_dir() / "tokens" / f"{key}.safetensors"
    if path.exists():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            log.warning("%s is unreadable (%s): made again", path, e)
    found = make()
    try:
        write_whole(path, to_bytes(found))
    except UserError as e:
        why = e.__cause__
        raise UserError(f"cannot write the cache {path.parent}: {why}; set LORAFACTORY_CACHE to another folder") from e
    return found


def key(processor: Any, *parts: Any) -> str:
    """What tokenised rows depend on: the processor whole, its library, and parts that JSON can write."""
    import tokenizers
    import transformers

    total = hashlib.sha256(json.dumps([FORMAT, transformers.__version__, tokenizers.__version__, *parts]).encode())
    processor("", truncation=False, padding=False)  # forgets the last call's max_length, which it would save
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*.*")):
            total.update(f"{file.name}\0".encode() + file.read_bytes())
    return total.hexdigest()[:32]
