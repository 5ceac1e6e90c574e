import math

from ..adapter import Part
from ..registry import register


@register("rslora")
class RSLoRA(Part):
    """rsLoRA: the scale is s = alpha / sqrt(rank) instead of alpha / rank.

    Kalajdzievski 2023: the one scaling under which neither activations nor gradients vanish or explode as the rank
    grows. To equal LoRA at a rank r0, give alpha / sqrt(r0). Each pair's own rank counts (rank_pattern); a budget that
    changes it later leaves the scale, and a loaded adapter keeps the scale it was saved with."""

    paper = "rsLoRA, arXiv 2312.03732"
    axis, needs = "dynamics", frozenset({"low_rank"})

    def attach(self):
        for _, low in self.adapter.low_ranks():
            low.scale.mul_(math.sqrt(low.rank))

    def to_peft(self, out):
        if out.alphas:  # PEFT divides them by sqrt(rank) then
            out.fields["use_rslora"] = True
            out.alphas = {n: alpha / math.sqrt(out.rank(n)) for n, alpha in out.alphas.items()}

    @classmethod
    def from_peft(cls, saved):
        if saved.fields.get("peft_type") != "LORA" or not saved.fields.get("use_rslora"):
            return None
        saved.drop("use_rslora")
        return {}
