import math
from dataclasses import dataclass, field
from functools import partial
from typing import List, Optional  # noqa: UP035  OmegaConf

import torch
import torch.distributed as dist

from .. import linalg
from ..adapter import Part
from ..errors import UserError
from ..policy import (
    ActorCritic,
    Denoiser,
    Learner,
    advantages,
    ddim_loss,
    ddim_noised,
    ddim_sample,
    log_prob,
    ppo_loss,
    standard,
)
from ..registry import BudgetConfig, register


def capacity(bandwidth: float, snr: float) -> float:
    """Bits a second of a channel of `bandwidth` Hz at `snr` dB (Shannon)."""
    return bandwidth * math.log2(1 + 10 ** (snr / 10))


def entropy(counts: torch.Tensor) -> float:
    """How evenly tokens spread over those that occur, in [0, 1]; counts [n]: how often each does."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum() / max(1.0, math.log2(max(2, len(share)))))


@register("airllm")
class AirLLM(Part):
    """AirLLM: update = s B diag(gate * mask) A; before each step a policy chooses how many ranks each pair sends.

    2025, by the authors' code. The update crosses a channel of BW log2(1 + SNR) bits a second, and what a step sends costs
    c = 32 sum_i r_i (d_in + d_out + 1) bits over those of `latency` seconds. Where c > 1 the step trains nothing and its
    reward is -10 c - cost c, else -(task loss) - cost c. Then the channel is drawn anew. An actor sees channel, entropy and
    share of unknown tokens of the last batch and all r_i / rank, and draws a coarse action in [-1, 1]; a DDIM conditioned on
    it with classifier-free guidance refines it to one rank a pair. After each episode PPO trains the actor on its steps
    and the DDIM trains on a replay of (coarse action, ranks, reward), what earned more counting more. B and A start
    orthonormal, the gate at 0; orthonormality of what is sent is a penalty. A masked rank has no gradient, yet the
    optimiser's momentum moves it. The end keeps the ranks of the last step: a plain LoRA.

    A loop of one's own tells the loss by `optimizer.lifecycle.loss = loss` before step(); where it does not, that of the
    first batch that attach() was given is measured, a forward pass a step. Special tokens count for the entropy
    (the authors leave them out), the first state has none of it, and the unknown token is an option, since a part knows
    no tokenizer. The policy's tensors are saved with a checkpoint, 3 numbers a weight, and not with an export.

    Cost: before each step 2 `sampling` passes of a small network over one vector; at an episode's end `epochs` steps of the
    actor and `updates` of the denoiser."""

    paper = "AirLLM, arXiv 2507.11515"
    axis, needs, does = "budget", frozenset({"low_rank"}), frozenset({"penalty on the factors"})
    minds = frozenset({"mixes ranks"})  # gates from zero between orthogonal factors: the form of an SVD
    actor: Learner
    denoiser: Learner

    @dataclass
    class Config(BudgetConfig):
        """min_rank: the least that a pair sends; snr: dB, and bandwidth: Hz, drawn each step; latency: seconds; cost: weight
        of what is sent, against the loss; violation: what a step that sends too much loses, times c; penalty: on the
        factors; unknown_token: its id, for the share of unknown tokens (null: 0); episode: steps; gamma, decay: of the
        advantages; clip: of PPO's ratio; epochs: of PPO on an episode; policy_lr, diffusion_lr: Adam's; coarse: numbers of the
        coarse action; hidden, width: of the actor and of the denoiser; noise_steps: of the diffusion, of which sampling takes
        `sampling`; guidance: 1 is the conditional model alone; drop: share of conditions left out in its training; replay:
        steps that it remembers, of which it trains from `warmup` on, `updates` batches of `batch` an episode;
        reward_weight: how much more a higher reward counts there."""

        min_rank: int = 1
        snr: List[float] = field(default_factory=lambda: [-5.0, 0.0, 5.0, 10.0, 15.0])  # noqa: UP006
        bandwidth: List[float] = field(default_factory=lambda: [1e8])  # noqa: UP006
        latency: float = 1.0
        cost: float = 0.1
        violation: float = 10.0
        penalty: float = 0.01
        unknown_token: Optional[int] = None  # noqa: UP045
        episode: int = 15
        gamma: float = 0.99
        decay: float = 0.95
        clip: float = 0.2
        epochs: int = 4
        policy_lr: float = 1e-4
        diffusion_lr: float = 5e-5
        coarse: int = 16
        hidden: int = 256
        width: int = 512
        noise_steps: int = 1000
        sampling: int = 50
        guidance: float = 1.5
        drop: float = 0.1
        replay: int = 10000
        warmup: int = 128
        updates: int = 4
        batch: int = 64
        reward_weight: float = 0.1

        def check(self):
            self.check_least(1, "min_rank", "episode", "epochs", "coarse", "hidden", "width", "sampling", "updates", "batch",
                             "replay", "warmup")  # fmt: skip
            self.check_least(0, "cost", "violation", "penalty", "reward_weight", "unknown_token", "guidance")
            self.check_shares("drop")
            for name in ("gamma", "decay"):
                if not 0 <= getattr(self, name) <= 1:
                    raise UserError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
            if not self.snr or not self.bandwidth:
                raise UserError("snr and bandwidth are lists of what is drawn: give at least one of each")
            self.check_positive("latency", "clip", "policy_lr", "diffusion_lr")
            if (least := min(self.bandwidth)) <= 0:
                raise UserError(f"bandwidth is {least}; it must be positive")
            if not self.sampling <= self.noise_steps:
                raise UserError(f"sampling is {self.sampling}, of noise_steps={self.noise_steps}: give at most that")
            if not self.warmup <= self.replay:
                raise UserError(f"warmup is {self.warmup}, and replay={self.replay} never holds as many")

    def pairs(self):
        return [low for _, low in self.adapter.low_ranks()]

    def attach(self):
        c, pairs = self.config, self.pairs()
        for low in pairs:
            low.add_gate(0.0, unit_norm=True)
        m = len(pairs)
        device = pairs[0].A.device if pairs else torch.device("cpu")
        self.actor = Learner(ActorCritic(4 + m, c.coarse, c.hidden), c.policy_lr, device)
        self.denoiser = Learner(Denoiser(m, c.coarse, c.width), c.diffusion_lr, device)

        def buffer(name, *shape, dtype=torch.float32):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

        buffer("sent", m, dtype=torch.long)  # ranks of each pair; 0: the policy has not acted, and nothing is masked
        buffer("channel", 2)  # SNR and bandwidth
        buffer("text", 2)  # entropy and share of unknown tokens of the last batch
        buffer("at", dtype=torch.long)  # steps of this episode that are done
        buffer("states", c.episode, 4 + m)
        buffer("actions", c.episode, c.coarse)
        buffer("told", c.episode, 3)  # log-probability, value, reward
        buffer("memory", c.replay, c.coarse + m + 1)  # coarse action, ranks as vector, reward
        for name in ("remembered", "violations", "episodes", "diffusion_steps"):
            buffer(name, dtype=torch.long)
        self.register_load_state_dict_post_hook(_masked)

    # what is sent

    def mask(self):
        for low, r in zip(self.pairs(), self.sent.tolist(), strict=True):
            low.set_mask((torch.arange(low.rank) < r).float() if 0 < r < low.rank else None, always=True)

    def send(self, ranks):
        self.sent.copy_(ranks)
        self.mask()

    def full(self):
        """Ranks of every pair, [pairs]."""
        return torch.tensor([low.rank for low in self.pairs()], device=self.sent.device)

    def decode(self, z):
        """z [pairs] in [-1, 1] -> ranks."""
        full = self.full()
        least = full.clamp_max(self.config.min_rank)
        return (least + ((z + 1) / 2 * (full - least)).floor().long()).clamp(least, full)

    def encode(self, ranks):
        full = self.full()
        least = full.clamp_max(self.config.min_rank)
        return 2 * (ranks - least) / (full - least).clamp_min(1) - 1

    def cost(self):
        """c of this step."""
        numbers = sum(r * (low.A.shape[1] + low.B.shape[0] + 1) for low, r in zip(self.pairs(), self.sent.tolist(), strict=True))
        snr, bandwidth = self.channel.tolist()
        return 32 * numbers / (capacity(bandwidth, snr) * self.config.latency)

    # the policy

    def state(self):
        """[1, 4 + pairs]"""

        def place(value, among):
            low, high = min(among), max(among)
            return (value - low) / (high - low) if high > low else 0.5

        c, (snr, bandwidth) = self.config, self.channel.tolist()
        places = self.text.new_tensor([place(snr, c.snr), place(bandwidth, c.bandwidth)])
        return torch.cat([places, self.text, self.sent / self.full()])[None]

    def draw_channel(self):
        c = self.config
        self.channel.copy_(torch.tensor([v[int(torch.randint(len(v), ()))] for v in (c.snr, c.bandwidth)]))

    def new_episode(self):
        self.at.zero_()
        self.send((self.full() // 2).maximum(self.full().clamp_max(self.config.min_rank)))

    def act(self):
        c, i, state = self.config, int(self.at), self.state()
        mean, log_std, value = self.actor(state)
        action = mean + log_std.exp() * torch.randn_like(mean)
        z = ddim_sample(self.denoiser, action.tanh(), len(self.sent), c.noise_steps, c.sampling, c.guidance)
        self.states[i], self.actions[i] = state[0], action[0]
        self.told[i] = torch.stack([log_prob(action, mean, log_std)[0], value[0], value.new_zeros(())])
        self.send(self.decode(z[0]))

    def learn(self):
        """PPO on the episode; the denoiser on what it remembers."""
        c, n = self.config, int(self.at)
        states, actions, (old, values, rewards) = self.states[:n], self.actions[:n], self.told[:n].T
        ends = torch.zeros(n, device=old.device)
        ends[-1] = 1
        gain = advantages(rewards, values, ends, 0.0, c.gamma, c.decay)
        returns, gain = gain + values, standard(gain)
        for _ in range(c.epochs):
            for i in torch.randperm(n, device=old.device).split(c.batch):
                self.actor.step(partial(ppo_loss, action=actions[i], old=old[i], gain=gain[i], returns=returns[i], clip=c.clip),
                                states[i])  # fmt: skip
        held = min(int(self.remembered), c.replay)
        for _ in range(c.updates if held >= c.warmup else 0):
            rows = self.memory[torch.randperm(held, device=old.device)[: c.batch]]
            coarse, z, earned = rows.split([c.coarse, rows.shape[1] - c.coarse - 1, 1], 1)
            noised = ddim_noised(z, coarse, c.noise_steps, c.drop)
            self.denoiser.step(partial(ddim_loss, noise=noised[0], rewards=earned[:, 0], weight=c.reward_weight), *noised[1:])
            self.diffusion_steps += 1
        self.episodes += 1

    # hooks

    def __getstate__(self):
        return {**self.__dict__, "stage": None}  # as Adapted's own

    def begin(self, stage):
        self.__dict__["stage"] = stage
        if stage.index or self.adapter.started:
            return
        if self.config.min_rank > int(self.full().max()):
            raise UserError(f"min_rank is {self.config.min_rank}, and no pair has more than {int(self.full().max())} ranks")
        for low in self.pairs():
            low.A.copy_(linalg.orthonormal(torch.randn_like(low.A)))
            low.B.copy_(linalg.orthonormal(torch.randn_like(low.B.mT)).mT)
        self.draw_channel()
        self.new_episode()
        self.act()

    def before_forward(self, batch):
        ids, unknown = batch.get("input_ids") if hasattr(batch, "get") else None, self.config.unknown_token
        if ids is None and unknown is not None:
            raise UserError(f"unknown_token={unknown} has no meaning here: the batches have no input_ids")
        if self.training and ids is not None:
            mask = batch.get("attention_mask")
            self.__dict__.setdefault("read", []).append(ids.flatten() if mask is None else ids[mask.bool()])

    def look(self):
        """At the tokens of the step, of all processes."""
        read = self.__dict__.pop("read", [])
        tokens = torch.cat(read) if read else self.sent.new_zeros(0)
        length = int(_together(1 + torch.cat([tokens, tokens.new_full((1,), -1)]).max(), "MAX"))
        counts = _together(tokens.bincount(minlength=length))
        if counts.any():
            unknown = self.config.unknown_token
            seen = counts[unknown] if unknown is not None and unknown < length else 0
            self.text.copy_(torch.tensor([entropy(counts), float(seen / counts.sum())]))

    def before_step(self, step):
        self.look()
        loss = torch.as_tensor(self.measured() if step.loss is None else step.loss).detach().to(self.text)
        total, processes = _together(torch.stack([loss, torch.ones_like(loss)])).tolist()
        c, cost = self.config, self.cost()
        if cost > 1:
            self.violations += 1
            for p in self.adapter.parameters():
                p.grad = None
        task = c.violation * cost if cost > 1 else total / processes
        if self.sent.any():
            self.told[int(self.at), 2] = -task - c.cost * cost

    def measured(self):
        """The loss on the first batch."""
        stage = self.__dict__.get("stage")
        for batch in stage.batches(1) if stage else ():
            with torch.random.fork_rng():
                return stage.loss(batch)
        raise UserError(f"{self.name} rewards its policy by the loss: give attach(…, batches=[…]), or tell it before each "
                        "step, optimizer.lifecycle.loss = loss")  # fmt: skip

    def after_step(self, step):
        ended = not self.sent.any()  # this step was nobody's choice
        if not ended:
            i = int(self.at)
            row = torch.cat([self.actions[i].tanh(), self.encode(self.sent), self.told[i, 2:]])
            self.memory[int(self.remembered) % len(self.memory)] = row
            self.remembered += 1
            self.at += 1
            if ended := int(self.at) == self.config.episode:
                self.learn()
        if step.index + 1 == step.total:
            return
        self.draw_channel()
        if ended:
            self.new_episode()
        self.act()

    def penalises(self):
        return self.config.penalty > 0

    def penalty(self):
        if not self.penalises():
            return 0.0
        found = []
        for low, r in zip(self.pairs(), self.sent.tolist(), strict=True):
            r = r or low.rank
            grams = low.A[:r] @ low.A[:r].T, low.B[:, :r].T @ low.B[:, :r]
            found.append(sum((g - torch.eye(r, dtype=g.dtype, device=g.device)).square().sum() for g in grams))
        return self.config.penalty * sum(found) / len(found)

    def end(self, stage):
        for low, r in zip(self.pairs(), self.sent.tolist(), strict=True):
            low.set_mask(None)
            if 0 < r < low.rank:
                low.keep(torch.arange(r, device=low.A.device))
        self.sent.zero_()
        return False

    def counters(self):
        sent = sum(r or low.rank for low, r in zip(self.pairs(), self.sent.tolist(), strict=True))
        return {"episodes": int(self.episodes), "violations": int(self.violations), "ranks_sent": sent,
                "diffusion_steps": int(self.diffusion_steps)}  # fmt: skip


def _masked(part, _):
    """After loading."""
    part.mask()


def _together(numbers: torch.Tensor, how: str = "SUM") -> torch.Tensor:
    """Over the processes, which share one policy."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(numbers, getattr(dist.ReduceOp, how))
    return numbers
