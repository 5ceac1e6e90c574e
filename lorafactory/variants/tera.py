import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from .. import linalg
from ..adapter import Delta, Structure, linear
from ..adapter.bank import checksum, uniform
from ..errors import UserError
from ..registry import StructureConfig, register

ZEROS = ("last", "first")


def times(x, factors):
    """(F_1 kron F_2 kron ...) x for every row x of [..., d], one F_n [I_n, R_n] after the other."""
    before = 1
    for f in factors:
        x = (f @ x.reshape(*x.shape[:-1], before, f.shape[1], -1)).flatten(-3)
        before *= f.shape[0]
    return x


def modes(d: int, parts: int) -> list[int]:
    return [n for n in linalg.split(d, parts) if n > 1] or [1]


class Network(nn.Module):
    """What all layers of a shape share, frozen: factors [I_n, R_n], the first `half` of them for the outputs, and the core,
    a matrix [R_1 ... R_half, R_half+1 ... R_N]. Drawn from the seed in float32 on the CPU, uniform, so bit-equal wherever
    the generator is. Unless kept, a checkpoint holds but a checksum, and loading compares."""

    def __init__(self, site, c):
        super().__init__()
        rows, columns = modes(site.d_out, c.order // 2), modes(site.d_in, c.order - c.order // 2)
        self.half, self.seed, self.kept = len(rows), c.network_seed, c.save_network
        ranks = [max(1, round(c.ratio * n)) for n in rows + columns]
        g = torch.Generator().manual_seed(c.network_seed)
        shapes = [
            (math.prod(ranks[: self.half]), math.prod(ranks[self.half :])),
            *zip(rows + columns, ranks, strict=True),
        ]
        bounds = [math.sqrt(3 / n) for n in (site.d_in, *ranks)]
        drawn = [uniform(g, *s, bound=b) for s, b in zip(shapes, bounds, strict=True)]
        self.names = ["core", *(f"factor{i}" for i in range(len(ranks)))]
        for name, t in zip(self.names, drawn, strict=True):
            self.register_buffer(name, t.to(site.new()), persistent=c.save_network)
        self.register_buffer("checksum", checksum(1, *drawn).to(site.new().device))

    def factors(self):
        return [getattr(self, name) for name in self.names[1:]]

    def complaint(self, name, state):
        saved = state[f"{name}.checksum"].cpu()
        if self.kept:
            same = torch.equal(checksum(1, *(state[f"{name}.{n}"] for n in self.names)), saved)
            return [] if same else [f"{name}.checksum is not that of its tensors: the file is damaged"]
        told = f"network_seed {self.seed} draws another network here (another torch?): train with save_network=true"
        return [] if torch.equal(self.checksum.cpu(), saved) else [f"{name}.checksum: {told}"]


class TeRADelta(Delta):
    """W = W0 + s (kron_n<=k A_n D_n) G (kron_n>k A_n D_n)^T; D_n = diag(d_n), d_n [R_n] trained, G and A_n the network's"""

    def __init__(self, network: Network, site, c):
        super().__init__()
        self.__dict__["network"] = network
        self.d = nn.ParameterList(site.new(f.shape[1], fill=c.d_initial) for f in network.factors())
        nn.init.zeros_(self.d[-1 if c.zero == "last" else 0])
        self.register_buffer("scale", site.new(fill=c.scale))

    def scaled(self):
        """A_n D_n of the outputs, and of the inputs."""
        found = [a * d for a, d in zip(self.network.factors(), self.d, strict=True)]
        return found[: self.network.half], found[self.network.half :]

    def randomize(self):
        for d in self.d:
            nn.init.normal_(d)

    def weight(self, base):
        rows, columns = self.scaled()
        return base.weight + self.scale * times(times(self.network.core, columns).T, rows).T

    def update(self, x, base, y):
        rows, columns = self.scaled()
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.scale.dtype)
        z = linear(times(x, [f.T for f in columns]), self.network.core)
        return times(self.scale * z, rows)


@register("tera")
class TeRA(Structure):
    """TeRA: the update is a Tucker network, core and factors random, frozen and shared; diagonals between them train.

    Its tensor has modes of rows and of columns; core G and factors A_n are those of all layers of a shape, d_n a layer's.

    Gu et al. 2025. d_out = I_1 ... I_k and d_in = I_k+1 ... I_N. The rank is min(R_1 ... R_k, R_k+1 ... R_N), full with
    R_n = I_n, at sum R_n numbers a layer. Two modes are VeRA's vectors around a full-rank matrix. Seen of the paper is
    its abstract, and no code; inferred are: order and the lengths I_n (about equal), ratio, the start (one vector zero, as
    in VeRA, the others d_initial), s, and the random numbers: uniform, A_n of variance 1 / R_n and G of 1 / d_in, so that
    an update by unit vectors has entries of that variance.

    Cost: R_1 ... R_N products a position for the core, which is d_in d_out with R_n = I_n and once in memory a shape, and
    about sum I_n times d_in + d_out for the factors. The update is not formed, so that no gradient of its size is."""

    paper = "TeRA, arXiv 2509.03234"
    gives = frozenset({"weight"})

    @dataclass
    class Config(StructureConfig):
        """order: N, half of the modes for rows; ratio: R_n / I_n; scale: s; d_initial: every entry of d_n at first but of the
        last or the first vector, which is zero (zero: last or first); network_seed: draws the network, whatever the
        run's seed; save_network: keep it in the checkpoint, else its checksum."""

        order: int = 4
        ratio: float = 1.0
        scale: float = 1.0
        d_initial: float = 1.0
        zero: str = "last"
        network_seed: int = 0
        save_network: bool = False

        def check(self):
            self.check_least(2, "order")
            self.check_positive("ratio")
            for key in ("scale", "d_initial"):
                if getattr(self, key) == 0:
                    raise UserError(f"{key} is 0: nothing would ever train")
            self.check_choices(zero=ZEROS)
            self.check_seeds("network_seed")

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.networks = nn.ModuleDict()
        for s in adapter.sites:
            if s.sizes not in self.networks:
                self.networks[s.sizes] = Network(s, config)

    def build(self, site, make):
        return TeRADelta(self.networks[site.sizes], site, self.config)

    def complaints(self, state):
        return [bad for key, k in self.networks.items() for bad in k.complaint(f"structure.networks.{key}", state)]
