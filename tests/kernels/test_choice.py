"""Which implementation runs, what is refused, and what the record says."""

import os
import subprocess
import sys

import pytest
import torch

from lorafactory import UserError, kernels
from lorafactory.kernels import choice


@pytest.fixture(autouse=True)
def fresh_choice():
    kernels.forget()
    yield
    kernels.choose("auto")


def run():
    y, h, b = torch.randn(4, 6), torch.randn(4, 2), torch.randn(6, 2)
    kernels.sqnorm(torch.randn(6, 5), torch.randn(2, 5), b)
    return kernels.compose(y, h, b, gain=torch.rand(6))


@pytest.mark.parametrize("name", ["auto", "reference", "eager"])
def test_what_ran_is_noted(name):
    kernels.choose(name)
    run()
    found = "reference" if name == "reference" else "eager"
    assert kernels.used() == {"compose": [found], "sqnorm": [found]}
    kernels.forget()
    assert kernels.used() == {}


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(UserError, match="kernels is 'fast'; it takes auto, reference, eager, triton"):
        kernels.choose("fast")
    monkeypatch.setattr(choice, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no CUDA device"):
        kernels.choose("triton")
    monkeypatch.setattr(choice, "installed", lambda: False)
    with pytest.raises(UserError, match="Triton is not installed"):
        kernels.choose("triton")


def test_a_dtype_that_no_twin_takes_is_refused(monkeypatch):
    monkeypatch.setattr(choice, "_hindrance", lambda: "")
    kernels.choose("triton")
    with pytest.raises(UserError, match="takes float32, bfloat16 and float16, not float64"):
        kernels.compose(*(torch.randn(s, dtype=torch.float64) for s in ((4, 6), (4, 2), (6, 2))), gain=torch.rand(6))


def test_triton_is_imported_only_where_it_runs():
    code = "import sys, lorafactory, torch; from lorafactory import attach; "
    code += "attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), 'dora', rank=1)(torch.randn(2, 4)).sum().backward(); "
    code += "assert 'lorafactory.kernels.twins' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
