from dataclasses import dataclass

from ..adapter.restarting import Restarting, RestartingConfig
from ..registry import register


@register("periodic_lora")
class PeriodicLoRA(Restarting):
    """PeriodicLoRA: at the end of each stage W0 <- W0 + (1 - m) s B A and B <- m B: the update is unloaded, but for momentum m.

    Meng et al. 2024. The base stays as it is: what is unloaded joins the pair's frozen past, and the function does not
    change. At m = 0 all of it goes and A, B are drawn anew. The authors have published no code that we know of. Inferred:
    the form of the momentum (a public reimplementation adds m s B A and shrinks both factors by 1 - m, which changes the
    function), its size, stages of a quarter of the run (the paper's are shares of an epoch), that A and B forget their
    optimiser's moments, and that the rate rises again from 0 to where train.schedule stands.

    Cost: a step reads min(rank (stages + 1), full rank) ranks; `every` beyond the run's steps is plain LoRA, and the counter
    `restarts` says so."""

    paper = "PeriodicLoRA, arXiv 2402.16141"

    @dataclass
    class Config(RestartingConfig):
        """every: optimiser steps a stage, or below 1 as a share of the run's; warmup: steps from 0 to the full rate after
        an unloading, or below 1 as a share of `every`; momentum: the share of the update that stays in the pair."""

        momentum: float = 0.5

        def check(self):
            super().check()
            self.check_shares("momentum")

    def restart(self, low, state):
        if self.config.momentum:
            low.unload(1 - self.config.momentum)
        else:
            low.fold()
        for p in (low.A, low.B, low.gate):
            state.pop(p, None)
