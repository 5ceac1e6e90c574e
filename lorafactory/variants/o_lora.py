from dataclasses import dataclass

from ..adapter import Continual, used
from ..registry import ContinualConfig, register


@register("o_lora")
class OLoRA(Continual):
    """O-LoRA: a pair a stage, earlier ones frozen and active; loss + orthogonality sum |A_old A^T| + norm sum |.|_2 of A and B.

    Wang et al. 2023, eq. 8; A_old are the rows of all earlier A, and the first stage is plain LoRA. Their paper writes the
    squares of the entries, their code the absolute values, as here; `entries: squared` has the paper's. `norm` is the second
    penalty of their code (0, on their long sequence 0.1 to 0.3 for some tasks). Their second weight by task has no
    counterpart: one value for all stages. Cost: a product [R, d_in] x [d_in, rank] a layer and step, R the earlier ranks."""

    paper = "O-LoRA, arXiv 2310.14152"
    does = frozenset({"penalty on the factors"})

    @dataclass
    class Config(ContinualConfig):
        """orthogonality, norm: weights of the two penalties; entries: of A_old A^T, absolute or squared."""

        orthogonality: float = 0.5
        norm: float = 0.0
        entries: str = "absolute"

        def check(self):
            self.check_least(0, "orthogonality", "norm")
            self.check_choices(entries=("absolute", "squared"))

    def orthonormal(self):
        return False

    def remember(self, low, memory):
        memory.add(used(low))

    def overlap(self, m):
        return m.abs().sum() if self.config.entries == "absolute" else m.square().sum()

    def penalty(self):
        c, total = self.config, 0.0
        for _, low, memory in self.pairs():
            if c.orthogonality and len(memory.rows):
                total = total + c.orthogonality * self.overlap(memory.rows @ low.A.T)
            if c.norm and low.A.numel():
                # the root of 0 has no slope: B starts there
                total = total + c.norm * sum(p.square().sum().clamp_min(1e-24).sqrt() for p in (low.A, low.B))
        return total
