from dataclasses import dataclass

from ..adapter import Delta, LowRank, linear
from ..adapter.ranked import Ranked, RankedConfig, fitting
from ..errors import UserError
from ..registry import register

PARTITIONS = ("rank", "input")


class ArmsDelta(Delta):
    """W = W0 + s (B_1 + ... + B_n) A; the B_i [d_out, rank] are one tall B [n d_out, rank]"""

    def __init__(self, low_rank: LowRank, arms: int):
        super().__init__()
        self.arms_pair, self.arms = low_rank, arms  # a name of its own: a LoRA must not load it

    def weight(self, base):
        return base.weight + self.arms_pair.product().unflatten(0, (self.arms, -1)).sum(0)

    def update(self, x, base, y):
        return self.arms_pair(x, lambda x, a, b: linear(x, a, b.unflatten(0, (self.arms, -1)).sum(0)))


class HeadDelta(Delta):
    """W = W0 + s B [A ... A]; A [rank, d_in / n] reads the sum of the n chunks of x"""

    def __init__(self, low_rank: LowRank, arms: int):
        super().__init__()
        self.head_pair, self.arms = low_rank, arms

    def weight(self, base):
        return base.weight + self.head_pair.product().repeat(1, self.arms)

    def update(self, x, base, y):
        low = self.head_pair

        def through(x, a, b):
            return linear(x.unflatten(-1, (self.arms, -1)).sum(-2), a, b)

        return low(x, through)


@register("block_lora")
class BlockLoRA(Ranked):
    """Block-LoRA: LoRA's factors as n blocks that share one down-projection, so that products become sums.

    Zhou et al. 2025, without public code; which way the blocks lie is inferred, and both readings are here:
    partition rank: W = W0 + (alpha / rank) (B_1 + ... + B_n) A, A [rank, d_in] and each B_i [d_out, rank]: a LoRA of rank
    n rank, cut into n blocks of which only one A is left;
    partition input: W = W0 + (alpha / rank) B [A ... A], A [rank, d_in / n] and B [d_out, rank].
    `rank` is the update's; by the paper's, which is n times that in the first reading, the scale would be alpha / (n rank).
    At the rank of the paper both have as many parameters, r d_out + r d_in / n. By rank, only the sum of the B_i counts: they
    get one gradient, start alike at zero and stay alike, so it is a LoRA whose B learns n times as fast under SGD.

    Cost: rank (d_in + d_out) products a position by rank, rank (d_in / n + d_out) by input."""

    paper = "Block-LoRA, arXiv 2501.16720"
    gives = frozenset({"low_rank", "input", "weight"})

    @dataclass
    class Config(RankedConfig):
        """arms: n, how many blocks; partition: rank or input (n divides d_in)."""

        arms: int = 2
        partition: str = "rank"

        def check(self):
            super().check()
            self.check_least(1, "arms")
            self.check_choices(partition=PARTITIONS)

        def gives(self):
            return super().gives() - ({"input"} if self.partition == "input" else set())

    def build(self, site, make):
        n = self.config.arms
        if self.config.partition == "rank":
            return ArmsDelta(self.low_rank(site, n * site.d_out), n)
        if site.d_in % n:
            raise UserError(f"arms is {n}; it must divide {site.d_in}, the inputs of {site.name}")
        rank = fitting(self.rank(site), min(site.d_in // n, site.d_out), site)
        return HeadDelta(LowRank(site.d_in // n, site.d_out, rank, self.scale(site), site.base.weight, self.config.dropout), n)
