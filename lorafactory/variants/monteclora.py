import contextlib
from dataclasses import dataclass

import torch
import torch.nn as nn

from ..adapter import Elastic, LowRank, Posterior, exact
from ..errors import UserError
from ..registry import PosteriorConfig, register

LEAST_VARIANCE, LEAST = 1e-3, 1e-6
# of the last draw: what all read in this training pass, what all read whatever the mode, Sigma and pi
DRAWN = {"fixed": None, "held": None, "sigma": None, "pi": None}


class Cloud(Elastic):
    """What one pair's A is drawn from: A + N(0, size^2 (sum_k pi_k^2) Sigma), Sigma [rank] diagonal

    tau [rank]       trained: Sigma = exp(tau)^2 times a draw of chi2(rank), the diagonal of a Wishart matrix, row by row
    kappa [experts]  trained: pi, about Dirichlet(exp kappa), by its logistic-normal form; a pair without ranks has none"""

    def __init__(self, low: LowRank, config):
        super().__init__()
        self.__dict__.update(low=low, config=config, **DRAWN)
        self.tau = nn.Parameter(torch.rand_like(low.A[:, 0]))
        self.kappa = nn.Parameter(torch.rand(config.experts).to(low.A))

    def __getstate__(self):
        return {**self.__dict__, **DRAWN}  # what a pass drew belongs to its graph, which no copy has

    def shapes(self):
        return {"tau": ("r",), "kappa": ("e",)}

    def forward(self):
        """What is added to A; None: its mean is taken."""
        if self.held is not None:
            return self.held
        if not (self.training and torch.is_grad_enabled()):
            return None
        return self.draw() if self.fixed is None else self.fixed

    def draw(self):
        with exact():
            c, rank = self.config, len(self.tau)
            if not rank:
                return None
            chi2 = self.tau.new_empty(rank, rank).normal_().square().sum(1)
            sigma = ((2 * self.tau).exp() * chi2).clamp_min(LEAST_VARIANCE)
            alpha = self.kappa.exp().clamp_min(LEAST)
            pi = (logistic_mean(alpha) + logistic_variance(alpha).sqrt() * torch.randn_like(alpha)).softmax(0)
            self.__dict__.update(sigma=sigma, pi=pi)
            size = c.size**2 if c.double_size else c.size
            # sum_k pi_k E_k of N(0, 1) entries is one N(0, sum_k pi_k^2)
            return size * pi.square().sum().sqrt() * sigma.sqrt()[:, None] * torch.randn_like(self.low.A)

    def divergence(self):
        """Of the draw that the forward pass took: the KL terms and the entropy term."""
        c, alpha = self.config, self.kappa.exp().clamp_min(LEAST)
        kl = dirichlet_kl(alpha, c.prior, c.official_kl) + wishart_kl(self.tau)
        total = c.kl_weight * (kl if self.sigma is None else kl + normal_kl(self.sigma, c.experts))
        return total if self.pi is None or not c.entropy else total + self.pi.square().sum()

    def forget(self):
        self.__dict__.update(DRAWN)

    @torch.no_grad()
    def keep(self, index):
        self.forget()
        self.tau = nn.Parameter(self.tau.detach().index_select(0, index))
        self.settle()

    @torch.no_grad()
    def resize(self, rank):
        self.forget()
        self.tau = nn.Parameter(torch.rand(rank).to(self.tau))
        self.settle()

    def settle(self):
        """kappa has its components where there is a rank, and only there."""
        wanted = self.config.experts if len(self.tau) else 0
        if len(self.kappa) != wanted:
            self.kappa = nn.Parameter(torch.rand(wanted).to(self.tau))


def logistic_mean(alpha):
    """The mean [n] of the normal whose softmax is nearest to Dirichlet(alpha)."""
    return alpha.log() - alpha.log().mean()


def logistic_variance(alpha):
    n = len(alpha)
    return ((1 - 2 / n) / alpha + (1 / alpha).sum() / n**2).clamp_min(LEAST)


def dirichlet_kl(alpha, prior: float, official: bool = False):
    """KL(Dirichlet(alpha) | Dirichlet(prior, ..., prior)); official: the sum of log Gamma with the sign of their code."""
    other = torch.full_like(alpha, prior)
    sign = 1 if official else -1
    gammas = alpha.sum().lgamma() - other.sum().lgamma() + sign * (alpha.lgamma() - other.lgamma()).sum()
    return gammas + ((alpha - other) * (alpha.digamma() - alpha.sum().digamma())).sum()


def wishart_kl(tau):
    """KL(W(diag(exp tau)^2, rank) | W(I, rank)), both of rank degrees of freedom."""
    s, r = (2 * tau).exp(), len(tau)
    return 0.5 * r * (s.sum() - s.log().sum() - r)


def normal_kl(sigma, experts: int):
    """experts times KL(N(0, diag sigma) | N(0, I))."""
    return 0.5 * experts * (sigma.sum() - sigma.log().sum() - len(sigma))


@register("monteclora")
class MonteCLoRA(Posterior):
    """MonteCLoRA: A is drawn in training, A + sum_k pi_k size E_k Sigma^(1/2), pi ~ Dirichlet, Sigma ~ Wishart; KL in the loss.

    Sengupta et al. 2024. The mean A, a log scale a rank (tau) and a log concentration a component (kappa) train; sigma and pi
    are drawn anew in every forward pass, by Bartlett's and the logistic-normal form. Evaluation, merging and exports use the
    mean A; samples=N scores the mean of N draws' predictions, each draw the same for the whole split, and records their
    spread. The loss gains, averaged over pairs, kl_weight (KL of Dirichlet, Wishart and normal) + sum_k pi_k^2.
    Of the N components one matrix N(0, sum_k pi_k^2) is drawn, which is the same distribution without N noises. Their code
    gets the sign of the Dirichlet's log Gamma sum wrong, and so does PEFT's (official_kl); their layer multiplies by the size
    twice, PEFT's once (double_size). A decomposition sees one draw a pass if before_forward(batch) is called, as our loops do.

    Cost: rank + experts numbers a pair, and rank d_in normal draws a pass; samples=N evaluates N times."""

    paper = "MonteCLoRA, arXiv 2411.04358"
    needs = frozenset({"low_rank"})

    @dataclass
    class Config(PosteriorConfig):
        """experts: components of the mixture; size: of the noise (their sample_scaler); double_size: size^2, as in their
        layer; kl_weight; prior: concentration of the Dirichlet's prior; entropy: add sum_k pi_k^2, which evens the weights;
        official_kl: the Dirichlet's KL as their code has it; samples: draws that an evaluation averages over (0: the mean)."""

        experts: int = 4
        size: float = 3e-4
        double_size: bool = False
        kl_weight: float = 1e-5
        prior: float = 1.0
        entropy: bool = True
        official_kl: bool = False
        samples: int = 0

        def check(self):
            self.check_least(2, "experts")
            self.check_least(0, "size", "kl_weight", "samples")
            self.check_positive("prior")
            if not self.kl_weight and (self.prior != 1 or self.official_kl):
                raise UserError("kl_weight is 0, so prior and official_kl change nothing: leave them out")

    def attach(self):
        self.clouds = nn.ModuleList(Cloud(low, self.config) for _, low in self.adapter.low_ranks())
        for cloud in self.clouds:
            cloud.low.__dict__["noise"] = cloud
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def complaints(self, state):
        names = {m: n for n, m in self.adapter.named_modules()}
        ranks = {names[c]: len(state[f"{names[c.low]}.A"]) for c in self.clouds}
        wanted = {f"{n}.tau": r for n, r in ranks.items()}
        wanted |= {f"{n}.kappa": self.config.experts if r else 0 for n, r in ranks.items()}
        return [f"{n} is {list(state[n].shape)}, not [{r}]" for n, r in wanted.items() if len(state[n]) != r]

    @property
    def samples(self):
        return self.config.samples

    def before_forward(self, batch):
        """One draw for whatever reads a pair in this pass, and again where it is recomputed."""
        if self.training and torch.is_grad_enabled():
            for cloud in self.clouds:
                cloud.__dict__["fixed"] = cloud.draw()

    @contextlib.contextmanager
    def drawn(self):
        try:
            with torch.no_grad():
                for cloud in self.clouds:
                    cloud.__dict__["held"] = cloud.draw()
            yield
        finally:
            self.forget()

    def penalises(self):
        return bool(self.config.kl_weight or self.config.entropy)

    def penalty(self):
        found = [cloud.divergence() for cloud in self.clouds if len(cloud.tau)]
        return sum(found) / len(found) if found else 0.0

    def after_step(self, step):
        self.draws += any(cloud.sigma is not None for cloud in self.clouds)
        self.forget()

    def forget(self):
        for cloud in self.clouds:
            cloud.forget()

    def counters(self):
        deviations = torch.cat([c.tau.detach().exp() for c in self.clouds])
        spread = float(self.config.size * deviations.mean()) if len(deviations) else 0.0
        return {"drawn_steps": int(self.draws), "mean_deviation": spread, "draws_an_evaluation": self.samples}
