"""Image classification on any source with a column of pictures and a label column."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import SPLITS, corruptions, register_task
from .classification import Classification
from .degrading import Degraded
from .pictures import Picture, read
from .pixels import Pixels, Processor, cached
from .reading import Raw

HEADS = ("linear", "zero_shot")
PROMPT = "a photo of a {}."


@register_task("image")
class Image(Classification):
    """A picture under class names, as the model's own image processor prepares it."""

    auto_model = "AutoModelForImageClassification"
    auto_processor = "AutoImageProcessor"
    processor_options = {"backend": "pil"}  # one resize rule everywhere, torchvision there or not

    @dataclass
    class Config(Classification.Config):
        """image: the column of pictures. head: `linear`, drawn and trained; or, for CLIP, `zero_shot`: the features of
        every class's prompt, frozen. prompt: for zero_shot, with {} where the class name goes, `_` read as a space.
        symmetric: for zero_shot, the loss is also that of each class's text among the pictures of a step, its pictures right.
        degraded: training pictures pass degradations in random order, the same in every epoch; scored ones never.
        corruption: of all pictures, `blur:3` or another of corruptions.KINDS, from 1 to 5; `rotate:90` turns them."""

        kind: str = "image"
        image: str = "image"
        head: str = "linear"
        prompt: str = PROMPT
        symmetric: Optional[bool] = None  # noqa: UP045
        degraded: Optional[bool] = None  # noqa: UP045
        corruption: str = ""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.head not in HEADS:
                raise UserError(f"task.head={self.head}: there are {', '.join(HEADS)}")
            if self.prompt.count("{}") != 1:
                raise UserError(f"task.prompt={self.prompt!r}: write {{}} once, where the class name goes")
            if self.head == "linear" and self.prompt != PROMPT:
                raise UserError(f"task.prompt={self.prompt!r} has no effect on task.head=linear: leave it out")
            if self.head == "linear" and self.symmetric:
                raise UserError("task.symmetric=true needs texts to find pictures for: task.head=zero_shot")
            if self.corruption:
                corruptions.parse(self.corruption)

    @property
    def couples(self) -> bool:  # type: ignore[override]
        return bool(self.config.symmetric)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """With `symmetric` as CoDyRA trains CLIP (arXiv 2412.01004, their code): plus the mean over classes of -sum log p(its
        pictures | text), p over the pictures of the batch."""
        if not self.config.symmetric:
            return super().loss(model, batch)
        logits, labels = self._logits(model, batch), batch["labels"]
        right = F.one_hot(labels, logits.shape[1]).T.to(logits)
        return F.cross_entropy(logits, labels, reduction="sum") + len(labels) * F.cross_entropy(logits.T, right)

    def read(self) -> dict[str, Raw]:
        c = self.config
        return read(c.source, c.subset, c.revision, c.image, c.label)

    def shown(self, split: str, inputs: list[Any]) -> list[Any]:
        if not self.config.degraded or split != "train":
            return inputs
        return [Degraded(p, self.config.split_seed) for p in inputs]

    def place(self, raw: dict[str, Raw]) -> dict[str, Raw]:
        found, how = super().place(raw), self.config.corruption
        return {s: replace(r, inputs=corruptions.All(r.inputs, how)) for s, r in found.items()} if how else found

    def content(self, row: Picture) -> str:
        return row.digest

    def head(self) -> dict[str, Any]:
        if self.config.head == "linear":
            return super().head()
        return super().head() | {"prompts": [self.config.prompt.replace("{}", n.replace("_", " ")) for n in self.labels]}

    def load_model(self, where: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        if self.config.head == "linear":
            return super().load_model(where, **options)
        from .zero_shot import load

        return load(where, **options)

    def prepare(self, processor: Any) -> None:
        self.processor = Processor(processor, self.inputs["train"][0])
        self.splits = {s: Pixels(cached(self.processor, self.inputs[s]), self.targets[s]) for s in SPLITS}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        values = self.processor.scale(torch.from_numpy(np.stack([r["pixel_values"] for r in rows])))
        return {"pixel_values": values, "labels": torch.tensor([r["labels"] for r in rows])}
