"""Continual: what protects earlier stages over low-rank pairs, and the directions that a pair remembers of them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from .elastic import Elastic
from .low_rank import LowRank
from .part import Part, Stage
from .site import Site


class Memory(Elastic):
    """rows [m, d_in]: directions of a layer's input that earlier stages used; orthonormal where a method needs that. Grows
    with the stages."""

    rows: Tensor

    def __init__(self, low: LowRank, orthonormal: bool):
        super().__init__()
        self.orthonormal = orthonormal
        self.d_in = low.A.shape[1]
        self.register_buffer("rows", low.A.detach().new_zeros(0, self.d_in))

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        return {"rows": ("m", self.d_in)}

    def complaints(self, saved: dict[str, Tensor]) -> list[str]:
        bad = super().complaints(saved)
        if not bad and self.orthonormal and len(rows := saved["rows"].double()):
            apart = (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().max()
            bad = ["rows are not orthonormal: the file is damaged"] if apart > 1e-3 else []
        return bad

    def add(self, rows: Tensor) -> None:
        self.rows = torch.cat([self.rows, rows.detach().to(self.rows)])

    def inside(self, x: Tensor) -> Tensor:
        """x V^T V for orthonormal rows V: of vectors x [..., d_in] the part that lies in their span."""
        return x @ self.rows.T @ self.rows

    def extend(self, rows: Tensor) -> None:
        """Orthonormal rows stay orthonormal, and span what is new in these, too."""
        rows = rows.detach().to(self.rows)
        _, s, vt = torch.linalg.svd(rows - self.inside(rows), full_matrices=False)
        new = vt[s > 1e-5 * rows.norm().clamp_min(1e-30)][: self.d_in - len(self.rows)]
        self.add(new - self.inside(new))


def used(low: LowRank) -> Tensor:
    """The directions of the input that the update of this stage reads: A's rows, and those of its start."""
    return low.A if low.A0 is None else torch.cat([low.A, low.A0])


class Continual(Part):
    """When a stage after the first one begins, each pair's update is frozen and fresh factors start beside it from zero, so
    that what earlier stages learnt stays as it is; remember() sees the factors before that, start() the fresh ones."""

    axis = "continual"
    needs: ClassVar[frozenset[str]] = frozenset({"low_rank"})
    # only the last factors would be remembered; a past has no ranks to cut
    minds: ClassVar[frozenset[str]] = frozenset({"restarts the factors", "trains truncations"})
    stage: Tensor

    def attach(self) -> None:
        self.memories = nn.ModuleList(Memory(low, self.orthonormal()) for _, low in self.adapter.low_ranks())
        self.register_buffer("stage", torch.tensor(-1))  # the one that has begun: a resumed run begins it once more

    def pairs(self) -> list[tuple[Site, LowRank, Memory]]:
        return [(s, low, m) for (s, low), m in zip(self.adapter.low_ranks(), self.memories, strict=True)]  # type: ignore[misc]

    def begin(self, stage: Stage) -> None:
        if stage.index <= int(self.stage):
            return
        if stage.index:
            for _, low, memory in self.pairs():
                self.remember(low, memory)
                low.fold()
        self.start(stage)
        self.stage.fill_(stage.index)

    def orthonormal(self) -> bool:
        """Whether what is remembered is an orthonormal basis."""
        return True

    def remember(self, low: LowRank, memory: Memory) -> None:
        """Keep what the stages to come must know of the one that is over."""

    def start(self, stage: Stage) -> None:
        """The fresh factors, where they are not to be random."""

    def counters(self) -> dict[str, float]:
        return {"directions_kept": float(sum(len(m.rows) for _, _, m in self.pairs()))}
