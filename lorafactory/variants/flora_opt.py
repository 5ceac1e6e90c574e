from dataclasses import dataclass

import torch

from ..adapter import Part
from ..detour import OnWeights, fit_weights
from ..errors import UserError
from ..registry import DynamicsConfig, register

SMALLEST_SQUARE, SMALLEST_SCALE = 1e-30, 1e-3  # Adafactor's epsilons


def projection(shape, rank: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    """P [rank, the shorter side], N(0, 1 / rank), so that E[P^T P] = I: the same for the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(rank, min(shape), generator=generator, dtype=like.dtype, device=like.device) / rank**0.5


def down(g, p):
    """G [d_out, d_in], its shorter side projected: P G or G P^T."""
    return p @ g if g.shape[0] < g.shape[1] else g @ p.T


def up(c, p, shape):
    """C -> P^T C or C P, [d_out, d_in]."""
    return p.T @ c if shape[0] < shape[1] else c @ p


def normalised(g, state, decay):
    """G over the root of Adafactor's second moment, which is kept as the means of its rows and of its columns."""
    squares = g.square() + SMALLEST_SQUARE
    share = 1 - state["steps"] ** -decay  # of what was; 0 in the first step
    rows = share * state.get("rows", 0) + (1 - share) * squares.mean(1)
    columns = share * state.get("columns", 0) + (1 - share) * squares.mean(0)
    state.update(rows=rows, columns=columns)
    return g * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()


class FloraOptimizer(OnWeights):
    def step_own(self, groups):
        for p, group in groups.items():
            state, c = self.state[p], self.part.config
            state["steps"] = state.get("steps", 0) + 1
            u = self.smoothed(normalised(p.grad, state, c.decay), state)
            u = u / (rms(u) / c.clip).clamp_min(1)
            lr = group["lr"] * (rms(p).clamp_min(SMALLEST_SCALE) if c.relative else 1.0)
            p.mul_(1 - lr * group.get("weight_decay", 0.0)).sub_(lr * u)

    def smoothed(self, u, state):
        """(1 - m) U + m up(M); M is updated, and moved to a new projection where that is due."""
        c, m = self.part.config, self.part.config.momentum
        if "seed" not in state:
            state.update(seed=self.draw(), moment=torch.zeros_like(down(u, u.new_zeros(c.rank, min(u.shape)))))
        p = projection(u.shape, c.rank, state["seed"], u)
        whole = up(state["moment"], p, u.shape)
        if state["steps"] % c.every == 0:
            state["seed"] = self.draw()
            p = projection(u.shape, c.rank, state["seed"], u)
            state["moment"] = down(whole, p)
        state["moment"] = m * state["moment"] + (1 - m) * down(u, p)
        return (1 - m) * u + m * whole

    def draw(self):
        self.part.projections += 1
        return int(torch.randint(2**62, ()))


def rms(t):
    return t.square().mean().sqrt()


@register("flora_opt")
class FloraOpt(Part):
    """Flora: whole weights train by Adafactor, their momentum kept as P G, P [rank, shorter side] random, redrawn at times.

    Hao et al. 2024, algorithm 2: U = (1 - m) G + m P^T M, M <- m M + (1 - m) P G, P ~ N(0, 1 / rank) from a seed, so that
    E[P^T P] = I; every `every` steps M moves to a new P, M <- P' P^T M. As in the authors' code G is what Adafactor's
    factored second moment leaves of the gradient, U is clipped to a root mean square of `clip`, and the rate is that of the
    weight's own root mean square. Seeds come from torch's generator, where theirs count from the parameters. Theirs also
    compresses gradients that are accumulated over micro-batches, which our loop adds up whole, and leaves out layers more
    than four times as wide as tall (embeddings): name target_modules. What is not the weight of a linear layer takes the
    run's own optimiser. The decay is decoupled, by the weight's own rate.

    Cost: a state of rank max(d_out, d_in) + d_out + d_in numbers a weight instead of 2 d_out d_in; P is drawn at each step."""

    paper = "Flora, arXiv 2402.03293"
    axis, needs, over = "dynamics", frozenset({"dense"}), "full"

    @dataclass
    class Config(DynamicsConfig):
        """rank: of the momentum; every: steps between projections (the paper's kappa); momentum: m; decay: the second
        moment's share of the new is steps^-decay; clip: the most that the root mean square of U may be; relative: the
        rate is a share of the weight's root mean square."""

        rank: int = 8
        every: int = 1000
        momentum: float = 0.9
        decay: float = 0.8
        clip: float = 1.0
        relative: bool = True

        def check(self):
            self.check_least(1, "rank", "every")
            self.check_positive("decay", "clip")
            if not 0 < self.momentum < 1:
                raise UserError(f"momentum is {self.momentum}; it must lie in (0, 1): without one there is nothing to compress")

    def attach(self):
        self.register_buffer("projections", torch.zeros((), dtype=torch.long))
        fit_weights(self, self.config.rank)

    def optimizer(self, groups, make):
        return FloraOptimizer(make(groups), self)

    def counters(self):
        return {"projected_weights": sum(1 for _ in self.adapter.dense()), "projections": int(self.projections)}
