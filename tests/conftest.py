"""What every test stands on: one torch thread, and the marker of what only `make test-all` runs."""

import pytest
import torch
from killing import Server

from lorafactory.kernels import Once


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_randomness():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def never_stale(monkeypatch):
    """Whatever is computed once a step is, whenever it is used, what computing it again gives."""
    kept = Once.__call__

    def checked(self, compute, *of):
        computed = []
        value = kept(self, lambda: (computed.append(1), compute())[1], *of)
        if not computed and not torch.compiler.is_compiling():
            pairs = zip(*((v if isinstance(v, tuple) else (v,)) for v in (value, compute())), strict=True)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), "it outlived what it was computed from"
        return value

    monkeypatch.setattr(Once, "__call__", checked)


@pytest.fixture(scope="session")
def server():
    """Runs in processes that are forked, not started."""
    with Server() as running:
        yield running
