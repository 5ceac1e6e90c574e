from dataclasses import dataclass

import torch

from .. import linalg
from ..adapter.framed import Framed, FramedConfig, FramedDelta
from ..registry import register


def simple_roots() -> torch.Tensor:
    """Rows: the simple roots of E8 in Bourbaki's order, each of squared norm 2."""
    rows = torch.zeros(8, 8, dtype=torch.float64)
    rows[0] = torch.tensor([1, -1, -1, -1, -1, -1, -1, 1]) / 2
    rows[1, :2] = 1
    for k in range(2, 8):
        rows[k, k - 2], rows[k, k - 1] = -1, 1
    return rows


def root_frame() -> torch.Tensor:
    """Eight roots that are orthogonal as they are, normed: Sylvester's Hadamard matrix over sqrt 8."""
    h = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    return torch.kron(h, torch.kron(h, h)) / 8**0.5


class E8Delta(FramedDelta):
    """W = W0 + s M; M [d_out, d_in] is a block [8, 8] again and again along the diagonal; s [1] trained"""


@register("e8_lora")
class E8LoRA(Framed):
    """E8-LoRA: y = W0 x + s Q x, Q a fixed orthogonal block [8, 8] of the E8 lattice repeated along the diagonal.

    Kornienko 2026, an abstract without measured results and no public code; all that trains is one number a layer. How Q
    follows from the roots, the tiling and s = 0 at first are inferred from its sister's sketch (Leech-LoRA), which starts
    at s = 1. Q is `simple_roots_gs`, the simple roots orthonormalised in order; `simple_roots_polar`, the orthogonal matrix
    nearest to them; or `root_frame`, eight roots orthogonal as they are. QR of a triangular basis of the lattice would
    give the identity. The controls random and identity tell whether the lattice matters. The update of a square layer
    has all singular values |s|.

    Cost: 8 products an input of each position, and as many numbers read as the base reads."""

    paper = "E8-LoRA, doi 10.5281/zenodo.18787442"
    delta, size = E8Delta, 8
    constructions = {
        "simple_roots_gs": lambda: linalg.orthonormal(simple_roots()),
        "simple_roots_polar": lambda: linalg.polar(simple_roots()),
        "root_frame": root_frame,
    }

    @dataclass
    class Config(FramedConfig):
        """construction: simple_roots_gs, simple_roots_polar, root_frame, random or identity."""

        construction: str = "simple_roots_gs"
