from dataclasses import dataclass

from ..adapter.nested import Nested, NestedConfig
from ..registry import register


@register("matryoshka_lora")
class MatryoshkaLoRA(Nested):
    """MatryoshkaLoRA: trains B diag(P) A, P_i = sum of s_r over the ranks r >= i of S: the sum of all truncations at once.

    2026, algorithm 1; S is 1, 2, 4, ... and the whole unless `ranks` says otherwise. P trains nothing and is gone after
    training: the adapter of rank r is s_r B[:, :r] A[:r], at the full rank too, where it is not what trained: by design. P
    lets the leading ranks learn as with a larger rate: tune the rate apart from LoRA's. `ranks` of the full rank alone is
    LoRA, whose truncations are then scored as well; one rank drawn each step is DyLoRA. The authors have no alpha, s_r =
    1 / sqrt(r): alpha = sqrt(rank), or rslora with alpha = 1; the ratio of P to LoRA's scale is theirs under any alpha.
    Their masked form of the same sum divides it by the number of ranks.

    A run scores every truncation: `truncations` in the record's metrics, and the area under that curve, `aurac_linear` and
    `aurac_log`, among those of each split.

    Cost: LoRA's, and one multiplication of B's columns; each truncation scored is one evaluation."""

    paper = "MatryoshkaLoRA, arXiv 2605.07850"
    now = "summed"

    @dataclass
    class Config(NestedConfig):
        scaling: str = "sqrt"

    def training_ranks(self):
        most = self.rank()
        return self.config.ranks or [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
