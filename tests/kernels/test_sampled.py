"""sampled: every implementation against float64 from the definition."""

import subprocess
import sys

import pytest
import torch
from support_kernels import near

from lorafactory import kernels

EXACT = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8}  # bf16: half a step of the result, at most
QUIET = """
import warnings
warnings.simplefilter("error")
import torch
from lorafactory import kernels
print(kernels.sampled(torch.ones(3, 30), torch.ones(3, 30), torch.tensor([1]), torch.tensor([2])).item())
"""


def places(d_out, d_in, share, device, index=torch.int32, ordered=True):
    flat = torch.randperm(d_out * d_in)[: round(share * d_out * d_in)].to(device)
    flat = flat.sort().values if ordered else flat
    return (flat // d_in).to(index), (flat % d_in).to(index)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.09, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 20, 30), (1, 40, 40), (70, 130, 31), (7, 1, 300), (50, 300, 1)], ids=str)
def test_it_is_its_definition(where, share, dtype, shape):
    device, _ = where
    n, d_out, d_in = shape
    wide = torch.randn(n, 2 * d_out, device=device).to(dtype)
    x = torch.randn(d_in, n, device=device).to(dtype).T
    for g in (wide[:, :d_out].contiguous(), wide[:, ::2]):
        for index, ordered in ((torch.int32, True), (torch.int64, False)):
            rows, columns = places(d_out, d_in, share, device, index, ordered)
            before = rows.clone(), columns.clone()
            found = kernels.sampled(g, x, rows, columns)
            exact = (g.double().T @ x.double())[rows, columns]
            assert found.dtype == dtype and near(found, exact, EXACT[dtype])
            assert torch.equal(rows, before[0]) and torch.equal(columns, before[1])


def test_nan_and_infinity_stay_where_they_are(where):
    device, _ = where
    g, x = torch.randn(9, 40, device=device), torch.randn(9, 50, device=device)
    g[2, 3], x[4, 7] = float("nan"), float("inf")
    rows, columns = torch.tensor([3, 5, 8], device=device), torch.tensor([1, 7, 9], device=device)
    found = kernels.sampled(g, x, rows, columns)
    assert found[0].isnan() and found[1].isinf() and found[2].isfinite()


@pytest.mark.parametrize("share, few", [(0.09, True), (0.2, False)])
def test_few_entries_need_no_dense_product(share, few, monkeypatch):
    made = []
    monkeypatch.setattr(torch.sparse, "sampled_addmm", lambda m, *_, **__: made.append(m) or m)
    kernels.sampled(torch.randn(5, 40), torch.randn(5, 30), *places(40, 30, share, "cpu"))
    assert bool(made) == few


def test_it_does_not_warn():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("3.0", "", 0)
