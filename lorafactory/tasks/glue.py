"""GLUE's classification tasks from the hub or a folder in its layout.

The public test labels are hidden (-1), so by default the public validation set is the test split and selection is a
seeded part of train, for every task alike. STS-B is a regression (regression.py); mnli and
mnli_mm score on its two validation sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List  # noqa: UP035  OmegaConf's spelling

from . import register_task
from .text import Text


@register_task("glue")
class Glue(Text):
    @dataclass
    class Config(Text.Config):
        kind: str = "glue"
        source: str = "nyu-mll/glue"
        text: List[str] = field(default_factory=lambda: ["sentence"])  # noqa: UP006
        test_split: str = "validation"
