from dataclasses import dataclass

from .. import linalg
from ..adapter import Init
from ..errors import UserError
from ..registry import InitConfig, register


@register("pissa")
class PiSSA(Init):
    """PiSSA: s B A starts as the leading rank terms of W0 = U diag(S) V^T: A = sqrt(S / s) V^T, B = U sqrt(S / s).

    Meng et al. 2024, eq. 2-3. The residual W0 - s B A of the paper is the anchor here: the base stays as it is."""

    paper = "PiSSA, arXiv 2404.02948"
    needs = frozenset({"low_rank", "additive"})

    @dataclass
    class Config(InitConfig):
        niter: int = 0  # of a randomised SVD; 0: the exact one

        def check(self):
            if self.niter < 0:
                raise UserError(f"niter is {self.niter}; it must be 0 (exact SVD) or more")

    def start(self, stage):
        for site, low in self.adapter.low_ranks():
            u, s, vt = linalg.truncated_svd(site.base.weight.to(low.A.dtype), low.rank, self.config.niter)
            root = (s / low.scale.abs()).sqrt()
            low.start(root[:, None] * vt, u * root * low.scale.sign())
