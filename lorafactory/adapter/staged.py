"""Staged: a module that has something of its own for each stage of a sequence."""

from __future__ import annotations

import torch.nn as nn


class Staged(nn.Module):
    """at: the stage that it computes for; None: as after the last one that began."""

    at: int | None = None

    def turn(self, index: int | None) -> None:
        self.at = index
