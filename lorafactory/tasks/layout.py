"""How prompts with completions lie in a batch: side by side, or packed into fewer sequences; and their loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

IGNORED = -100  # a label that is not learnt
Row = dict[str, Any]  # input_ids: prompt and completion; prompt: how many of them are the prompt's


def side_by_side(rows: list[Row], pad: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [rows, longest], padded on the right."""
    return _laid([[r] for r in rows], pad)


def packed(rows: list[Row], length: int, pad: int) -> dict[str, Tensor]:
    """The rows in as few sequences of at most `length` tokens as first-fit-decreasing finds. Positions start anew with
    each row and rows do not see each other, so a batch has one loss and one gradient, packed or not."""
    bins: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: -len(r["input_ids"])):
        room = (b for b in bins if sum(len(r["input_ids"]) for r in [*b, row]) <= length)
        found = next(room, None)
        if found is None:
            bins.append(found := [])
        found.append(row)
    return _laid(bins, pad)


def _laid(bins: list[list[Row]], pad: int) -> dict[str, Tensor]:
    """A sequence a bin. segments [sequences, tokens]: which row of its bin a token is of, from 1 on; 0: padding; only
    there where a bin holds several rows, as are position_ids."""
    longest = max(sum(len(r["input_ids"]) for r in b) for b in bins)
    ids = torch.full((len(bins), longest), pad)
    segments, places, labels = torch.zeros_like(ids), torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, rows in enumerate(bins):
        at = 0
        for k, r in enumerate(rows):
            n = len(r["input_ids"])
            here, learnt = slice(at, at + n), slice(at + r["prompt"], at + n)
            ids[i, here], segments[i, here], places[i, here] = torch.tensor(r["input_ids"]), k + 1, torch.arange(n)
            labels[i, learnt] = ids[i, learnt]
            at += n
    batch = {"input_ids": ids, "attention_mask": (segments > 0).long(), "labels": labels}
    return batch if all(len(b) == 1 for b in bins) else batch | {"segments": segments, "position_ids": places}


def sees(segments: Tensor) -> Tensor:
    """[sequences, 1, query, key] bool: earlier tokens of the same row; padding sees itself, or it would be 0/0."""
    n = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & torch.ones(n, n, dtype=torch.bool, device=segments.device).tril()
    return same[:, None]


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[sequences, learnt positions] float32: -log p of each label from the tokens before it, 0 where none is learnt.

    Logits are made only where some sequence learns: a vocabulary is wide."""
    labels = batch["labels"][:, 1:]
    places = (labels != IGNORED).any(0).nonzero().squeeze(1)
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask", "position_ids") if n in batch}
    if "segments" in batch:
        inputs["attention_mask"] = _mask(model, batch["segments"])
    logits = model(**inputs, logits_to_keep=places, use_cache=False).logits.float()
    kept = labels[:, places]
    return F.cross_entropy(logits.flatten(0, 1), kept.flatten(), ignore_index=IGNORED, reduction="none").view(kept.shape)


def _mask(model: Any, segments: Tensor) -> Tensor:
    mask, attention = sees(segments), getattr(model.config, "_attn_implementation", None)
    if attention == "sdpa":
        return mask
    if attention != "eager":
        raise UserError(f"task.packing=true with model.attention={attention}: packed rows need sdpa or eager")
    dtype = torch.get_autocast_dtype(segments.device.type) if torch.is_autocast_enabled(segments.device.type) else model.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
