from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch

from .. import probe
from ..adapter import Sparse, Structure
from ..adapter.peft import only_linear
from ..errors import UserError
from ..registry import StructureConfig, register

LEARNT = ("gradient", "snip")  # masks that a few training batches choose
MASKS = ("random", "magnitude", *LEARNT, "structured")
BATCHES = 8


def random(n: int, size: int) -> torch.Tensor:
    """n of `size` places, drawn by torch's generator."""
    draw = np.random.default_rng(int(torch.randint(2**62, ())))  # torch can only shuffle all of them
    return torch.from_numpy(np.sort(draw.choice(size, n, replace=False, shuffle=False)))


def largest(scores: torch.Tensor, n: int, offset: int) -> torch.Tensor:
    """The places of the n largest scores [d_out, d_in]; offset: of the n after the first offset times n."""
    return scores.flatten().topk(n * (offset + 1)).indices[n * offset :].sort().values


def structured(d_out: int, d_in: int, n: int, offset: int) -> torch.Tensor:
    """The diagonal and, spread evenly, as many whole rows as n entries allow; offset moves all of them."""
    k = torch.arange(min(d_out, d_in))
    moved = (k + offset) % max(d_out, d_in)
    diagonal = k * d_in + moved if d_out <= d_in else moved * d_in + k
    count = (n - len(k)) // d_in
    rows = (torch.arange(count) * d_out // count + offset) % d_out
    return torch.cat([diagonal, (rows[:, None] * d_in + torch.arange(d_in)).flatten()]).unique()


class SHiRADelta(Sparse):
    """W = W0 + S"""


@register("shira")
class SHiRA(Structure):
    """SHiRA: W = W0 + S; S [d_out, d_in] has n entries at places fixed before training, and only they train.

    Bhardwaj et al. 2024. n is that of a LoRA of the same rank, rank (d_in + d_out) (PEFT), or a share of the layer (the
    paper's 1 to 2 percent); the update's own rank is not bounded by it, and there is no alpha. Masks: `random`;
    `magnitude`, the largest |W0|; `gradient`, the largest |G| for the gradient G of W0 averaged over a few batches;
    `snip`, the largest |W0 * G|; `structured`, a diagonal of high rank and whole rows, where how rows are chosen is not
    told: here evenly. Positions are saved with the values. The paper's SHiRA-DoRA masks the update of a DoRA of high rank;
    with `dora`, here, the masked weight's rows are re-scaled.

    Cost: W0 is copied, once forward and once backward, and multiplied as without an adapter; backward forms the gradient
    of W of one layer at a time and keeps n numbers of it. Merging and its undoing touch n entries."""

    paper = "SHiRA, arXiv 2406.13175"
    gives = frozenset({"weight"})

    @dataclass
    class Config(StructureConfig):
        """rank: n = rank (d_in + d_out); fraction: n as a share of the layer's entries, in place of rank; mask_type;
        mask_offset: the next n in order instead, or other rows and another diagonal, so that two adapters do not overlap;
        mask_batches: what a gradient or snip mask is averaged over (null: 8)."""

        rank: int = 8
        fraction: Optional[float] = None  # noqa: UP045  OmegaConf
        mask_type: str = "random"
        mask_offset: int = 0
        mask_batches: Optional[int] = None  # noqa: UP045

        def check(self):
            self.check_least(1, "rank")
            if self.fraction is not None and not 0 < self.fraction <= 1:
                raise UserError(f"fraction is {self.fraction}; it must lie in (0, 1]")
            self.check_choices(mask_type=MASKS)
            self.check_least(0, "mask_offset")
            if self.mask_offset and self.mask_type == "random":
                raise UserError(f"mask_offset is {self.mask_offset}, of no effect on a random mask: it takes another seed")
            self.check_least(1, "mask_batches")
            if self.mask_batches is not None and self.mask_type not in LEARNT:
                raise UserError(f"mask_batches is {self.mask_batches}, of no effect on mask_type={self.mask_type}")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.data = config.mask_type in LEARNT

    def count(self, site) -> int:
        """n. Raises UserError where the layer has not as many."""
        c, size = self.config, site.d_out * site.d_in
        n = c.rank * (site.d_in + site.d_out) if c.fraction is None else max(1, round(c.fraction * size))
        parts = c.mask_offset + 1 if c.mask_type != "structured" else 1
        if n * parts > size:
            beyond = f" from mask_offset {c.mask_offset}" if parts > 1 else ""
            raise UserError(f"{n} entries{beyond} are more than the {size} of {site.name} [{site.d_out}, {site.d_in}]")
        least = min(site.d_out, site.d_in) + site.d_in
        if c.mask_type == "structured" and n < least:
            raise UserError(f"{n} entries of {site.name} are no structured mask: a diagonal and a row are {least}")
        return n

    def build(self, site, make):
        n, c = self.count(site), self.config
        if c.mask_type == "magnitude":
            index = largest(site.base.weight.detach().abs(), n, c.mask_offset)
        elif c.mask_type == "structured":
            index = structured(site.d_out, site.d_in, n, c.mask_offset)
        else:
            index = torch.arange(n) if self.data else random(n, site.d_out * site.d_in)
        return SHiRADelta(site, index)

    def begin(self, stage):
        if not self.data or stage.index or self.adapter.started:
            return
        grads = probe.gradients(stage, self.config.mask_batches or BATCHES)
        for site, d in self.adapter.inside(SHiRADelta):
            scores = grads[site.name].to(d.values).abs()
            if self.config.mask_type == "snip":
                scores = scores * site.base.weight.abs()
            d.move(largest(scores, len(d.values), self.config.mask_offset))

    def to_peft(self, out):
        found = list(self.adapter.inside(SHiRADelta))
        only_linear(self.name, (s for s, _ in found))
        ranks = {divmod(len(d.values), s.d_in + s.d_out) for s, d in found}
        if len(ranks) != 1 or any(rest for _, rest in ranks):
            raise UserError(f"PEFT has {self.name} of rank (d_in + d_out) entries a layer, with one rank")
        out.fields |= {"peft_type": "SHIRA", "r": next(iter(ranks))[0], "mask_type": "random"}
        for site, d in found:
            out.layers[site.name] = {"shira_weight": d.values, "shira_indices": d.index}

    @classmethod
    def from_peft(cls, saved):
        if saved.fields.get("peft_type") != "SHIRA":
            return None
        rank = saved.fields["r"]
        saved.drop("peft_type", "r", "mask_type", "random_seed", "init_weights")
        return {"rank": rank}

    def fill(self, saved):
        for site, d in self.adapter.inside(SHiRADelta):
            saved.take(site.name, "shira_weight", d.values)
            saved.take(site.name, "shira_indices", d.index)
