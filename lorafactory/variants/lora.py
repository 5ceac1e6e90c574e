from ..adapter import Additive, LowRank
from ..adapter.peft import A, B, common
from ..adapter.ranked import Ranked
from ..errors import UserError
from ..registry import register

STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # of PEFT's: those that leave the base as it is


class LoRADelta(Additive):
    """W = W0 + s B A"""

    def __init__(self, low_rank: LowRank):
        super().__init__()
        self.low_rank = low_rank

    def factors(self):
        return self.low_rank.factors()

    def randomize(self):
        self.low_rank.randomize()

    def thin(self, x):
        return self.low_rank.thin(x)


@register("lora")
class LoRA(Ranked):
    """LoRA: W = W0 + (alpha / rank) B A, with A [rank, d_in] random and B [d_out, rank] zero at the start.

    Hu et al. 2021, eq. 3. A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)) as in the authors' code, where the paper says Gaussian.
    Fast path: rank (d_in + d_out) products a position; no [d_out, d_in] update is formed."""

    paper = "LoRA, arXiv 2106.09685"
    default = True
    gives = frozenset({"low_rank", "input", "additive", "weight"})

    def build(self, site, make):
        return LoRADelta(self.low_rank(site))

    def to_peft(self, out):
        out.fields |= {"peft_type": "LORA", "lora_dropout": self.config.dropout}
        for site, low in self.adapter.low_ranks():
            bare = low.gate is None and low.A0 is None and low.A_past is None
            out.pair(site.name, *((low.B, low.A, float(low.scale)) if bare else low.factors()))

    @classmethod
    def from_peft(cls, saved):
        f = saved.fields
        if f.get("peft_type") != "LORA":
            return None
        if (start := f.get("init_lora_weights")) not in STARTS:
            told = "changed the base: PEFT saves a plain LoRA with path_initial_model_for_weight_conversion"
            raise UserError(f"init_lora_weights={start} {told}")
        ranks = {n: len(t[A]) for n, t in saved.layers.items() if A in t}
        if not ranks:
            raise UserError("it has no lora_A")
        rank, others = common(ranks)
        alpha, alphas = common({n: float(saved.of_layer("lora_alpha", "alpha_pattern", n)) for n in ranks})
        dropout = f.get("lora_dropout", 0.0)
        saved.drop("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "init_lora_weights",
                   "eva_config", "megatron_core", "qalora_group_size")  # fmt: skip
        return {"rank": rank, "rank_pattern": others, "alpha": alpha, "alpha_pattern": alphas, "dropout": dropout}

    def fill(self, saved):
        for site, low in self.adapter.low_ranks():
            saved.take(site.name, A, low.A)
            saved.take(site.name, B, low.B)
