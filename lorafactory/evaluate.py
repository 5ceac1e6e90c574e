"""Raw predictions of a split, each row exactly once whatever the number of processes, and the metrics on them."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from . import kernels
from .attach import Adapted
from .shard import is_sharded


@torch.no_grad()
def predict(adapted: Adapted, task: Any, split: str, batch_size: int, accelerator: Accelerator) -> list[Any]:
    """One raw prediction a row, in the split's order. The model's mode comes back as it was."""
    rows, mode = task.splits[split], adapted.training
    adapted.eval()
    order = sorted(range(len(rows)), key=rows.lengths().__getitem__) if hasattr(rows, "lengths") else range(len(rows))
    mine = order[accelerator.process_index :: accelerator.num_processes]  # rows of like length share a batch: less padding
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    found: list[tuple[int, Any]] = []
    own, most = len(batches), math.ceil(math.ceil(len(order) / accelerator.num_processes) / batch_size)
    if is_sharded(adapted.model):  # it runs as often in every process, or one would wait for ever
        batches += [list(order[:1])] * (most - own)
    with kernels.still():
        for k, index in enumerate(batches):
            batch = to_device(task.collate([rows[i] for i in index]), accelerator.device)
            adapted.adapter.before_forward(batch)
            with accelerator.autocast():
                predicted = task.predict(adapted, batch)
            if k < own:
                found += zip(index, predicted, strict=True)
    adapted.train(mode)
    if accelerator.num_processes > 1:
        found = gather_object(found)
    return [p for _, p in sorted(found, key=lambda pair: pair[0])]


@torch.no_grad()
def answer(adapted: Adapted, task: Any, batch: dict[str, Any], accelerator: Accelerator) -> list[Any]:
    """Raw predictions of one training batch as the model stands. Its mode comes back as it was."""
    mode = adapted.training
    adapted.eval()
    with accelerator.autocast():
        predicted = task.predict(adapted, batch)
    adapted.train(mode)
    return predicted


def score(adapted: Adapted, task: Any, split: str, batch_size: int, accelerator: Accelerator) -> tuple[dict, list]:
    """(metrics, raw predictions) of a split. Under a posterior the predictions are those of its mean, or the mean of
    those of its draws with their spread, and how well calibrated they are stands among the metrics."""
    posterior = adapted.adapter.posterior if adapted.mount.on else None
    draws, more = posterior.samples if posterior else 0, dict[str, Any]()
    if posterior is not None and draws:
        found = []
        for _ in range(draws):
            with posterior.drawn():
                found.append(predict(adapted, task, split, batch_size, accelerator))
        predictions, spread = task.average(found)
        more = {"samples": draws, "spread": spread}
    else:
        predictions = predict(adapted, task, split, batch_size, accelerator)
    references = task.references(split)
    if posterior is not None:
        more |= task.calibration(predictions, references)
    return task.metrics(predictions, references) | more, predictions


def aurac(curve: dict[int, float | None]) -> dict[str, float | str | None]:
    """Area under the rank-accuracy curve {rank: score}, by trapezoids over the ranks and over their logarithms, each
    divided by the range: MatryoshkaLoRA's v1 and v2. One rank: its score."""
    ranks = sorted(curve)
    scores = [s for r in ranks if (s := curve[r]) is not None]
    if len(scores) < len(ranks):
        return {f"aurac_{n}{w}": v for n in ("linear", "log") for w, v in (("", None), ("_undefined", "a rank has no score"))}
    heights = [(a + b) / 2 for a, b in zip(scores, scores[1:], strict=False)] or scores

    def area(x: list[float]) -> float:
        widths = [q - p for p, q in zip(x, x[1:], strict=False)] or [1.0]
        return sum(w * h for w, h in zip(widths, heights, strict=True)) / sum(widths)

    return {"aurac_linear": area([float(r) for r in ranks]), "aurac_log": area([math.log2(r) for r in ranks])}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
