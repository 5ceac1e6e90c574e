import math
from dataclasses import dataclass
from typing import List, Optional  # noqa: UP035  as in registry

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..adapter import Delta, Elastic, Structure, linear
from ..adapter.ranked import fitting
from ..errors import UserError
from ..registry import StructureConfig, register

POSITIONS = ("token", "sequence")


class Memory(Elastic):
    """What all layers share: K atoms [rank, rank] with keys [width], and the router that asks for them.

    trail: what the blocks of this forward pass left, {block: (the layer that led, its state, its weights)}."""

    grown = (("prior", "instruction"),)
    query: nn.Parameter  # [width, rank], as are ask, tell and value; query_past [width, width]
    query_past: nn.Parameter
    ask: nn.Parameter
    tell: nn.Parameter
    value: nn.Parameter
    prior: nn.Parameter | None
    instruction: torch.Tensor  # None without one, and prior too

    def __init__(self, like: torch.Tensor, c):
        super().__init__()
        self.top, self.beta, self.temperature = c.top, c.beta, c.temperature
        self.trail: dict = {}
        self.told: tuple = (None, None)  # by the batch: its mask and its instruction
        r, w = c.rank, c.width
        self.atoms = nn.Parameter(torch.eye(r).to(like) + 0.02 * like.new_empty(c.atoms, r, r).normal_())
        self.keys = nn.Parameter(like.new_empty(c.atoms, w).normal_(std=w**-0.5))
        for name, d_in in (("query", r), ("query_past", w), ("ask", r), ("tell", r), ("value", r)):
            setattr(self, name, nn.Parameter(like.new_empty(w, d_in).uniform_(-(d_in**-0.5), d_in**-0.5)))
        given = None if c.instruction is None else torch.tensor(c.instruction).to(like)
        self.register_buffer("instruction", given)
        prior = None if given is None else nn.Parameter(like.new_zeros(c.atoms, len(given)))
        self.register_parameter("prior", prior)

    def shapes(self):
        wide: dict = {n: ("w", "r") for n in ("query", "ask", "tell", "value")}
        own = {"atoms": ("k", "r", "r"), "keys": ("k", "w"), "query_past": ("w", "w")}
        return {**own, **wide, "prior": ("k", "i"), "instruction": ("i",)}

    def __getstate__(self):
        return {**self.__dict__, "trail": {}, "told": (None, None)}  # a copy has seen no batch

    def log_prior(self, e: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """beta log pi, pi = softmax(E i / tau), [K] or, where every row has an instruction of its own, [batch, ..., K]."""
        i = self.instruction if self.told[1] is None else self.told[1].to(like)
        logs = self.beta * (linear(i, e) / self.temperature).log_softmax(-1)
        return logs if logs.dim() == 1 else logs.view(len(logs), *[1] * (like.dim() - 2), -1)

    def weights(self, z: torch.Tensor, earlier: list[torch.Tensor]) -> torch.Tensor:
        """w [..., K], at most `top` of them above zero, from a state z [..., rank] and those of earlier blocks."""
        with torch.autocast(z.device.type, enabled=False):
            z, scale = z.to(self.keys.dtype), math.sqrt(self.keys.shape[1])
            query = F.linear(z, self.query)
            if earlier:
                past = torch.stack(earlier, -2).to(z.dtype)
                attention = ((F.linear(z, self.ask)[..., None, :] * F.linear(past, self.tell)).sum(-1) / scale).softmax(-1)
                query = query + F.linear((attention[..., None] * F.linear(past, self.value)).sum(-2), self.query_past)
            logits = F.linear(query, self.keys) / scale
            if self.prior is not None:
                logits = logits + self.log_prior(self.prior, logits)
            best, which = logits.topk(min(self.top, len(self.keys)), -1)
            return torch.zeros_like(logits).scatter(-1, which, best.softmax(-1))


class QueryableDelta(Elastic, Delta):
    """update = s B (sum_k w_k M_k) A x; A [rank, d_in] and B [d_out, rank] trained, the atoms M_k and w the memory's"""

    mergeable = False

    def __init__(self, memory: Memory, site, block: int, c):
        super().__init__()
        self.__dict__["memory"] = memory
        self.d_in, self.d_out, self.block = site.d_in, site.d_out, block
        self.pooled, self.dropout, bound = c.positions == "sequence", c.dropout, site.d_in**-0.5
        self.A = nn.Parameter(site.new(c.rank, site.d_in).uniform_(-bound, bound))
        self.B = nn.Parameter(site.new(site.d_out, c.rank))
        self.register_buffer("scale", site.new(fill=c.alpha / c.rank))

    def shapes(self):
        return {"A": ("r", self.d_in), "B": (self.d_out, "r"), "scale": ()}

    @property
    def rank(self):
        return len(self.A)

    def state(self, z):
        """What the router reads: z [..., rank] position by position, or its mean over a row's real positions."""
        if not self.pooled or z.dim() < 3:
            return z
        mask = self.memory.told[0]
        if mask is None or mask.shape != z.shape[:-1]:
            return z.mean(tuple(range(1, z.dim() - 1)), keepdim=True)
        m = mask[..., None].to(z)
        return (z * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp_min(1)

    def routed(self, z):
        """w of the block: asked for by the first of its layers that runs, the same for those that follow. A layer that
        sees other positions (a pooler) asks for itself."""
        trail, state = self.memory.trail, self.state(z)
        if self.block in trail:
            leader, theirs, w = trail[self.block]
            if leader is not self and theirs.shape == state.shape:
                return w
        before = [s for b, (_, s, _) in trail.items() if b < self.block and s.shape == state.shape]
        w = self.memory.weights(state, before)
        if self.block not in trail or trail[self.block][0] is self:
            kept = {b: left for b, left in trail.items() if b < self.block}  # what is deeper is of another pass
            self.memory.trail = {**kept, self.block: (self, state, w)}
        return w

    def update(self, x, base, y):
        x = self.drop(x)
        z = linear(x, self.A)
        # sum_k w_k M_k z = [M_1 ... M_K] (w outer z): no operator is formed for each position
        mixed = (self.routed(z)[..., :, None] * z[..., None, :]).flatten(-2)
        return linear(mixed, self.memory.atoms.transpose(0, 1).flatten(1), self.scale * self.B)


@register("queryable_lora")
class QueryableLoRA(Structure):
    """Queryable LoRA: y = W0 x + (alpha / rank) B R A x, R = sum_k w_k M_k a convex combination of atoms [rank, rank].

    Vaidya et al. 2026, an abstract without code: the atoms are a memory that all layers share, w the softmax over the
    top-k logits of a query made of the low-rank state z = A x and a running summary of earlier blocks, with a prior over
    atoms from an instruction. The rest is inferred: a block is `block` adapted layers one after another, its first asks;
    the summary is attention over the earlier blocks' states; logits are q . key / sqrt(width) + beta log softmax(E i / tau),
    E zero at first; M_k = I + 0.02 N(0, 1), A as in LoRA, B zero. w is each position's own by default: the mean over a
    sequence would tell a causal model of tokens to come, and a cache would need the prompt's. The instruction is a given
    vector, or the batch's entry `instruction` [batch, as long]. Its KL penalty and load balancing are left out. What depends
    on its input does not merge. One forward pass, then its backward: a second pass in between would overwrite the states
    that gradient checkpointing reads.

    Cost: rank (d_in + d_out) + atoms rank^2 products a position, and a block's query, atoms width + 4 width rank and
    2 width rank for every earlier block."""

    paper = "Queryable LoRA, arXiv 2605.08423"

    @dataclass
    class Config(StructureConfig):
        """atoms: K; top: how many at once; width: of keys and queries; block: how many adapted layers share a query;
        positions: token, or sequence (one w a row, from its mean state); instruction: its embedding, or null; beta: weight
        of its prior; temperature: tau; dropout: of what A reads."""

        rank: int = 8
        alpha: float = 16.0
        atoms: int = 16
        top: int = 4
        width: int = 16
        block: int = 4
        positions: str = "token"
        instruction: Optional[List[float]] = None  # noqa: UP006, UP045
        beta: float = 1.0
        temperature: float = 1.0
        dropout: float = 0.0

        def check(self):
            self.check_least(1, "rank", "atoms", "top", "width", "block")
            if self.top > self.atoms:
                raise UserError(f"top is {self.top}; there are {self.atoms} atoms")
            self.check_not_zero("alpha")
            self.check_choices(positions=POSITIONS)
            if self.instruction is not None and not (self.instruction and all(math.isfinite(v) for v in self.instruction)):
                raise UserError(f"instruction is {self.instruction}; it takes an embedding, a list of finite numbers")
            if self.beta < 0 or self.temperature <= 0:
                name = "beta" if self.beta < 0 else "temperature"
                raise UserError(f"{name} is {getattr(self, name)}; beta must be 0 or more, temperature above 0")
            if self.instruction is None and (self.beta, self.temperature) != (1.0, 1.0):
                raise UserError("beta and temperature weigh an instruction, and there is none: leave them out")
            self.check_shares("dropout")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.memory = Memory(adapter.sites[0].new(), config)
        self.__dict__["order"] = {s: i for i, s in enumerate(adapter.sites)}

    def build(self, site, make):
        fitting(self.config.rank, min(site.d_in, site.d_out), site)
        return QueryableDelta(self.memory, site, self.order[site] // self.config.block, self.config)

    def before_forward(self, batch):
        read = batch.get if hasattr(batch, "get") else {}.get
        given, mine = read("instruction"), self.memory.instruction
        if given is not None and (mine is None or given.shape[-1] != len(mine) or given.dim() != 2):
            want = "none here: give the option a vector of its length" if mine is None else f"[batch, {len(mine)}]"
            raise UserError(f"the batch's instruction is {list(given.shape)}; it must be {want}")
        self.memory.told, self.memory.trail = (read("attention_mask"), given), {}

    def complaints(self, state):
        found = self.sharing(QueryableDelta, "memory")
        ranks = [(n, len(state[f"{n}.A"]), state[f"{k}.atoms"].shape[1]) for _, n, k in found]
        return [f"{n}.A has rank {r}, the atoms {rank}" for n, r, rank in ranks if r != rank]
