from dataclasses import dataclass

import torch

from .. import linalg, probe
from ..adapter import Init
from ..errors import UserError
from ..registry import InitConfig, register

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weightS")


@register("lora_ga")
class LoRAGA(Init):
    """LoRA-GA: A, B start at singular vectors of the first gradient G = U S V^T, so the first step is full fine-tuning's.

    Wang et al. 2024, theorem 3.1: direction ArB2r is A = V[:, :r]^T, B = U[:, r:2r]; scale `stable` multiplies both by
    d_out^(1/4) / sqrt(gamma). The paper subtracts s B A from W0; here it is the anchor. Its authors recommend
    s = alpha / sqrt(rank), and take G with dropout on; here it is off. PEFT also multiplies B by singular values of G
    and leaves A out of `stable`, which the paper and its authors' code do not."""

    paper = "LoRA-GA, arXiv 2407.05000"
    needs = frozenset({"low_rank", "additive"})
    data = True

    @dataclass
    class Config(InitConfig):
        batches: int = 8  # over which G is averaged
        direction: str = "ArB2r"
        scale: str = "stable"
        gamma: float = 16.0  # of the scale `stable`
        norm_clip: bool = False  # shrink where max |s B A| > max |W0|
        niter: int = 4  # of a randomised SVD; 0: the exact one

        def check(self):
            self.check_choices(direction=DIRECTIONS, scale=SCALES)
            if self.batches < 1 or self.gamma <= 0 or self.niter < 0:
                given = f"batches={self.batches}, gamma={self.gamma}, niter={self.niter}"
                raise UserError(f"{given}: the first two must be positive, niter 0 or more")

    def start(self, stage):
        for site, low in self.adapter.low_ranks():
            if 2 * low.rank > min(site.d_in, site.d_out):
                most = min(site.d_in, site.d_out) // 2
                raise UserError(f"rank {low.rank} takes {2 * low.rank} singular vectors of {site.name}: at most {most}")
        grads = probe.gradients(stage, self.config.batches)
        for site, low in self.adapter.low_ranks():
            u, _, vt = linalg.truncated_svd(grads[site.name].to(low.A), 2 * low.rank, self.config.niter)
            left, right = self.columns(low.rank)
            a, b = vt[right], u[:, left]
            size = self.size(site, low)
            if self.config.norm_clip:
                most = (low.scale * size**2 * b @ a).abs().max()
                size = size * (site.base.weight.abs().max() / most).clamp_max(1).sqrt()
            low.start(size * a, size * b)

    def columns(self, r):
        """Which left and right singular vectors: indices for B, for A."""
        first, second = torch.arange(r), torch.arange(r, 2 * r)
        match self.config.direction:
            case "ArB2r":
                return second, first
            case "A2rBr":
                return first, second
            case "ArBr":
                return torch.arange(0, 2 * r, 2), torch.arange(1, 2 * r, 2)
        mixed = torch.randperm(2 * r)
        return mixed[:r], mixed[r:]

    def size(self, site, low):
        """What both factors are multiplied by, []."""
        match self.config.scale:
            case "stable":
                return low.A.new_tensor(site.d_out**0.25 / self.config.gamma**0.5)
            case "gd":
                return 1 / low.scale
            case "weightS":
                w = site.base.weight.to(low.A.dtype)
                return (linalg.truncated_svd(w, low.rank, self.config.niter)[1] / low.scale.abs()).sqrt().mean()
        return low.A.new_tensor(1.0)
