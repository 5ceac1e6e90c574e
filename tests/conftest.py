"""What every test stands on: one torch thread, and the marker of what only `make test-all` runs."""

import pytest
import torch
from killing import Server


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_randomness():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def server():
    """Runs in processes that are forked, not started."""
    with Server() as running:
        yield running
