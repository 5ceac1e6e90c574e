"""Ranked: what structures of a rank share: their options, and rank and scale per site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict  # noqa: UP035  as in registry

from ..errors import UserError
from ..registry import StructureConfig
from ..targets import per_site
from .low_rank import LowRank
from .part import Structure
from .site import Site

if TYPE_CHECKING:
    from .adapter import Adapter


@dataclass
class RankedConfig(StructureConfig):
    """rank; alpha: the update is scaled by alpha / rank; dropout: of what A reads, while the base sees all of x;
    rank_pattern, alpha_pattern: other values for some layers, {name, suffix or regular expression: value}."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_pattern: Dict[str, int] = field(default_factory=dict)  # noqa: UP006
    alpha_pattern: Dict[str, float] = field(default_factory=dict)  # noqa: UP006

    def check(self) -> None:
        self.check_least(1, "rank", "rank_pattern")
        self.check_shares("dropout")
        self.check_not_zero("alpha", "alpha_pattern")


def fitting(rank: int, most: int, site: Site) -> int:
    """The rank. Raises UserError where it is more than the most that this layer can have."""
    if rank > most:
        raise UserError(f"rank {rank} is more than {site.name} [{site.d_out}, {site.d_in}] can have: at most {most}")
    return rank


class Ranked(Structure):
    """A structure whose sites have a rank and a scale; most hold LowRank pairs."""

    Config = RankedConfig
    ranks: dict[str, int]
    alphas: dict[str, float]

    def __init__(self, config: Any, adapter: Adapter):
        super().__init__(config, adapter)
        self.__dict__["ranks"] = per_site(config.rank_pattern, adapter.sites, "rank_pattern")
        self.__dict__["alphas"] = per_site(config.alpha_pattern, adapter.sites, "alpha_pattern")

    def rank(self, site: Site) -> int:
        return self.ranks.get(site.name, self.config.rank)

    def most(self, site: Site) -> int:
        """The largest rank that means anything in this layer."""
        return min(site.d_in, site.d_out)

    def fitting(self, site: Site) -> int:
        """The rank. Raises UserError where it exceeds the layer's."""
        return fitting(self.rank(site), self.most(site), site)

    def scale(self, site: Site) -> float:
        """alpha / rank; 1 where a variant has no alpha."""
        alpha = self.alphas.get(site.name, self.config.alpha)
        return 1.0 if alpha is None else alpha / self.rank(site)

    def low_rank(self, site: Site, d_out: int | None = None) -> LowRank:
        """The site's pair, A [rank, d_in] and B [d_out, rank]."""
        rank = self.fitting(site)
        return LowRank(site.d_in, d_out or site.d_out, rank, self.scale(site), site.base.weight, self.config.dropout)
