"""Bank: frozen random tensors that all layers share, drawn again from a seed when an adapter is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import StructureConfig
from .elastic import Elastic


@dataclass
class BankConfig(StructureConfig):
    """bank_seed: draws the bank, whatever the run's seed; save_bank: keep the bank in the checkpoint, else its checksum."""

    bank_seed: int = 0
    save_bank: bool = False

    def check(self) -> None:
        self.check_seeds("bank_seed")


def uniform(generator: torch.Generator, *shape: int, bound: float) -> Tensor:
    """U(-bound, bound); one rounding, so bit-equal wherever the generator is."""
    return (2 * torch.rand(*shape, generator=generator) - 1) * bound


def checksum(rank: int, *tensors: Tensor) -> Tensor:
    """[rank] integers that tell every bit and its place; of each tensor's equal parts, the k-th makes the k-th integer."""
    rows = torch.cat([t.cpu().reshape(rank, -1) for t in tensors], 1)
    bits = rows.float().contiguous().view(torch.int32).long()
    return (bits * torch.arange(1, bits.shape[1] + 1)).sum(1)


class Bank(Elastic):
    """A and B, frozen, as large as the largest layer needs: others take a slice. draw() makes them; each holds a multiple of
    `rank` numbers.

    Drawn from `seed` in float32 on the CPU, whatever the device and dtype of the base. Unless `kept`, a checkpoint
    holds only their checksum, whose length is the rank: loading draws them again and compares."""

    A: Tensor
    B: Tensor
    checksum: Tensor

    def __init__(self, rank: int, seed: int, kept: bool, like: Tensor):
        super().__init__()
        self.seed, self.kept = seed, kept
        self.register_buffer("checksum", torch.empty(0))
        for name in ("A", "B"):
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.register_buffer(name, torch.empty(0, dtype=dtype, device=like.device), persistent=kept)
        self.hold(rank)

    def draw(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def drawn(self, rank: int) -> tuple[Tensor, Tensor]:
        return self.draw(rank, torch.Generator().manual_seed(self.seed))

    def hold(self, rank: int) -> None:
        a, b = self.drawn(rank)
        self.seal(rank, a, b)
        self.A, self.B = a.to(self.A), b.to(self.B)

    def seal(self, rank: int, a: Tensor, b: Tensor) -> None:
        self.checksum = checksum(rank, a, b.mT).to(self.A.device)

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        free = {name: tuple(f"{name}{i}" for i in range(getattr(self, name).dim())) for name in ("A", "B")}
        return {"checksum": ("r",), **(free if self.kept else {})}

    def complaints(self, saved: dict[str, Tensor]) -> list[str]:
        if bad := super().complaints(saved):
            return bad
        rank = len(saved["checksum"])
        a, b = self.drawn(rank)
        if self.kept:
            for name, here in (("A", a), ("B", b)):
                if saved[name].shape != here.shape:
                    return [f"{name} is {list(saved[name].shape)}, not {list(here.shape)}"]
            a, b = saved["A"], saved["B"]
        if torch.equal(checksum(rank, a, b.mT), saved["checksum"].cpu()):
            return []
        if self.kept:
            return ["checksum is not that of A and B: the file is damaged"]
        return [f"checksum: bank_seed {self.seed} draws another bank here (another torch?): train with save_bank=true"]

    def allocate(self, saved: dict[str, Tensor]) -> None:
        self.hold(len(saved["checksum"]))
