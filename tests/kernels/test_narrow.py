"""Products with few columns in another layout are the same products, and so are their gradients."""

import pytest
import torch
import torch.nn.functional as F
from support_kernels import near

from lorafactory.adapter import linear
from lorafactory.kernels.narrow import FEW, crossed, transposed


@pytest.mark.parametrize("r", [0, 1, 2, 8, FEW - 1, FEW])
def test_they_are_the_same_products(r):
    b, dz, h = torch.randn(40, r), torch.randn(30, 40), torch.randn(30, r)
    assert torch.equal(transposed(b), b.T) and near(crossed(dz, h), dz.double().T @ h.double(), 3e-6)
    assert transposed(b).is_contiguous() == (r < FEW)  # of one row or column it is in any layout
    given = [torch.randn(2, 30, r), b]
    found = [t.clone().requires_grad_() for t in given]
    exact = [t.double().requires_grad_() for t in given]
    ours, theirs = linear(*found), F.linear(*exact)
    assert near(ours.detach(), theirs.detach(), 3e-6)
    gradients = (torch.autograd.grad(z.sin().sum(), of) for z, of in ((ours, found), (theirs, exact)))
    assert all(near(mine, wanted, 1e-5) for mine, wanted in zip(*gradients, strict=True))
