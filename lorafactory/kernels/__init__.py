"""Plain functions that deltas call, each in up to three implementations of one definition; see docs/kernels.md."""

from .choice import CHOICES, choose, forget, used
from .compose import compose, rescale
from .narrow import transposed
from .norms import sqnorm, squares
from .once import Once, changed, held, leave, still, watch
from .sampled import sampled

__all__ = ["CHOICES", "Once", "changed", "choose", "compose", "forget", "held", "leave", "rescale", "sampled", "sqnorm",
           "squares", "still", "transposed", "used", "watch"]  # fmt: skip
