from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Decomposition, Delta, Wrapper, exact, length
from ..registry import DecompositionConfig, register


class MAPDelta(Wrapper):
    """W = a W0 / |W0| + s b D / |D|; D the inner delta's update, s its scale, |.| the norm of the whole matrix, a and b [1]
    trained"""

    def __init__(self, inner: Delta, site):
        super().__init__(inner)
        self.__dict__["scaled"] = next((m for m in inner.modules() if hasattr(m, "scale")), None)
        inner.randomize()  # b = 0 holds the update at zero
        dtype = torch.promote_types(site.base.weight.dtype, torch.float32)
        square = site.base.weight.detach().to(dtype).square().sum()[None]  # once: the base is read-only
        self.length: torch.Tensor
        self.register_buffer("length", length(square), persistent=False)
        self.a = nn.Parameter(self.length.clone())
        self.b = nn.Parameter(torch.zeros_like(self.a))

    def norm(self):
        """|D| = |B A|, [1]: the root of tr((B^T B)(A A^T)), or that of B A itself where there are more ranks than it has."""
        with exact():
            b, a = self.inner.factors()
            if len(a) > min(b.shape[0], a.shape[1]):
                return length((b @ a).square().sum()[None])
            return length(((b.T @ b) * (a @ a.T)).sum()[None])

    def gains(self):
        """What W0 and D are multiplied by."""
        b = self.b if self.scaled is None else self.b * self.scaled.scale
        return self.a / self.length, b / self.steady(self.norm)

    def weight(self, base):
        of_base, of_update = self.gains()
        b, a = self.inner.factors()
        return of_base * base.weight + of_update * (b @ a)

    def update(self, x, base, y):
        of_base, of_update = self.gains()
        base_part, update = self.split(x, base, y)
        return self.joined((of_base - 1) * base_part + of_update * update, base)


@register("map")
class MAP(Decomposition):
    """MAP: W = a W0 / |W0| + b D / |D|, D the update of any additive structure; one length a, one b a matrix, trained.

    Si et al. 2025 (over LoRA: LoMAP): matrices are vectors, so |.| is the Frobenius norm. Their code is not public; the
    paper's form as its summaries give it, with two things inferred. a starts at |W0| and b at 0; the direction of a zero
    D is not defined, so D starts at random, and it trains from the second step on, when b has moved. |D| is differentiated
    unless detach_norm. The length of D cancels; a scale that the structure has (alpha / rank) multiplies b instead, so that
    alpha decides how fast the update grows, as it does in LoRA. What otherwise only scales an update is refused.

    Cost: beside the inner delta's, two Gram matrices a forward pass and a pass over the output."""

    paper = "MAP, arXiv 2505.23094"
    delta = MAPDelta
    needs = frozenset({"additive"})
    minds = frozenset({"scales the update"})  # D / |D| undoes it

    @dataclass
    class Config(DecompositionConfig):
        """detach_norm: |D| is a constant in the backward pass."""

        detach_norm: bool = False

    def build(self, site, make):
        delta = super().build(site, make)
        if isinstance(delta, MAPDelta):
            delta.constant = self.config.detach_norm
        return delta
