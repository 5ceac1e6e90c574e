"""Networks that a part trains for itself, beside the adapter: an actor and critic by PPO, a denoiser of vectors by DDIM."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LOG_STD = (-5.0, 1.0)  # bounds of a policy's
BETAS, EMBEDDING = (1e-4, 2e-2), 64


class Learner(nn.Module):
    """A network whose weights, and Adam's moments of them, are buffers, flat: saved with the adapter, and no optimiser of
    the run's owns them."""

    weights: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor

    def __init__(self, net: nn.Module, lr: float, device: torch.device):
        super().__init__()
        self.__dict__.update(net=net)  # its form; the numbers are ours
        self.lr = lr
        flat = torch.cat([p.detach().flatten() for p in net.parameters()]).to(device)
        self.register_buffer("weights", flat)
        self.register_buffer("first", torch.zeros_like(flat))
        self.register_buffer("second", torch.zeros_like(flat))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, *args: Tensor, weights: Tensor | None = None) -> Any:
        flat, net = self.weights if weights is None else weights, self.__dict__["net"]
        shapes = {n: p.shape for n, p in net.named_parameters()}
        parts = flat.split([math.prod(s) for s in shapes.values()])
        return torch.func.functional_call(net, {n: t.view(shapes[n]) for n, t in zip(shapes, parts, strict=True)}, args)

    @torch.no_grad()
    def step(self, loss: Callable[[Any], Tensor], *args: Tensor) -> float:
        """One step of Adam on loss(what the network makes of args), its gradient clipped to a norm of 1; returns the loss
        before it."""
        with torch.enable_grad():
            w = self.weights.clone().requires_grad_()
            value = loss(self(*args, weights=w))
            (g,) = torch.autograd.grad(value, w)
        g = g * (1 / (g.norm() + 1e-6)).clamp_max(1)
        self.steps += 1
        t = int(self.steps)
        self.first.lerp_(g, 1 - 0.9)
        self.second.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        self.weights -= self.lr / (1 - 0.9**t) * self.first / ((self.second / (1 - 0.999**t)).sqrt() + 1e-8)
        return float(value)


class ActorCritic(nn.Module):
    """state [n, s] -> the mean [n, a] and log deviation [a] of a Gaussian action, and the state's value [n]"""

    def __init__(self, state: int, action: int, hidden: int):
        super().__init__()
        first = (nn.Linear(state, hidden), nn.LayerNorm(hidden), nn.Mish())
        self.encoder = nn.Sequential(*first, nn.Linear(hidden, hidden), nn.Mish())
        self.mean, self.value = nn.Linear(hidden, action), nn.Linear(hidden, 1)
        self.log_std = nn.Parameter(torch.full((action,), -0.5))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(state)
        return self.mean(h), self.log_std.clamp(*LOG_STD), self.value(h).squeeze(-1)


def log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Of a diagonal Gaussian, [n]."""
    return torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)


def advantages(rewards: Tensor, values: Tensor, ends: Tensor, last: Tensor | float, gamma: float, decay: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), [n]; ends [n]: 1 where an episode ends; last: the value of
    the state after the n-th; decay: its lambda."""
    found, gain, after = torch.zeros_like(rewards), torch.zeros_like(rewards[0]), torch.as_tensor(last).to(rewards)
    for i in reversed(range(len(rewards))):
        goes_on = 1 - ends[i]
        gain = rewards[i] + gamma * after * goes_on - values[i] + gamma * decay * goes_on * gain
        found[i], after = gain, values[i]
    return found


def standard(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std(unbiased=False) + 1e-6)


def ppo_loss(out: tuple[Tensor, Tensor, Tensor], action: Tensor, old: Tensor, gain: Tensor, returns: Tensor, clip: float,
             value: float = 0.5, entropy: float = 0.01) -> Tensor:  # fmt: skip
    """Proximal policy optimisation (Schulman et al. 2017), clipped; old [n]: log-probabilities when it acted."""
    mean, log_std, values = out
    ratio = (log_prob(action, mean, log_std) - old).exp()
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain).mean()
    spread = (0.5 + 0.5 * math.log(2 * math.pi) + log_std).sum()
    return value * F.mse_loss(values, returns) - surrogate - entropy * spread


class Denoiser(nn.Module):
    """(noisy z [n, m], time [n], condition [n, c]) -> the noise in z [n, m]"""

    def __init__(self, size: int, condition: int, width: int):
        super().__init__()

        def block(out: int) -> nn.Module:
            return nn.Sequential(nn.LayerNorm(width), nn.Mish(), nn.Linear(width, out))

        self.time = nn.Sequential(nn.Linear(EMBEDDING, width), nn.Mish())
        self.enter = nn.Linear(size + condition, width)
        self.blocks, self.leave = nn.ModuleList([block(width), block(width)]), block(size)

    def forward(self, z: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        half = EMBEDDING // 2
        angles = time[:, None] * torch.exp(-math.log(1e4) * torch.arange(half, device=z.device) / (half - 1))
        h = self.enter(torch.cat([z, condition], -1)) + self.time(torch.cat([angles.sin(), angles.cos()], -1))
        for b in self.blocks:
            h = h + b(h)
        return self.leave(h)


def kept_signal(steps: int, device: torch.device) -> Tensor:
    """alpha_bar [steps]: the share of the signal that is left after each step of noise; betas go as squares of a line."""
    betas = torch.linspace(math.sqrt(BETAS[0]), math.sqrt(BETAS[1]), steps, device=device).square()
    return torch.cumprod(1 - betas, 0)


def ddim_step(z: Tensor, noise: Tensor, kept: Tensor, kept_next: Tensor | None) -> Tensor:
    """From a share of signal to the next, or to none of the noise, without new noise (Song et al. 2021, eta = 0); what it
    takes for clean is kept within [-1, 1]."""
    clean = ((z - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
    return clean if kept_next is None else kept_next.sqrt() * clean + (1 - kept_next).sqrt() * noise


def guided(denoise: Callable, z: Tensor, time: Tensor, condition: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2021): 0 stands for no condition."""
    both = torch.cat([condition, torch.zeros_like(condition)])
    with_it, without = denoise(torch.cat([z, z]), torch.cat([time, time]), both).chunk(2)
    return without + guidance * (with_it - without)


def ddim_sample(denoise: Callable, condition: Tensor, size: int, steps: int, count: int, guidance: float) -> Tensor:
    """z [n, size] in [-1, 1] for each condition, by `count` of the `steps` of noise."""
    kept = kept_signal(steps, condition.device)
    times = torch.linspace(steps - 1, 0, count, device=condition.device).long()
    z = torch.randn(len(condition), size, device=condition.device)
    for i, t in enumerate(times):
        noise = guided(denoise, z, t.expand(len(z)), condition, guidance)
        z = ddim_step(z, noise, kept[t], kept[times[i + 1]] if i + 1 < count else None)
    return z


def ddim_noised(clean: Tensor, condition: Tensor, steps: int, drop: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(noise, z, time, condition): what the denoiser is to find, and what it gets; `drop` of the conditions are 0."""
    kept = kept_signal(steps, clean.device)
    time, noise = torch.randint(steps, (len(clean),), device=clean.device), torch.randn_like(clean)
    share = kept[time][:, None]
    there = (torch.rand(len(clean), 1, device=clean.device) >= drop).to(clean.dtype)
    return noise, share.sqrt() * clean + (1 - share).sqrt() * noise, time, condition * there


def ddim_loss(found: Tensor, noise: Tensor, rewards: Tensor, weight: float) -> Tensor:
    """The mean of squared errors, each times 1 + weight times its standardised reward [n], within [0.1, 10]."""
    return ((1 + weight * standard(rewards)).clamp(0.1, 10) * (found - noise).square().mean(-1)).mean()
