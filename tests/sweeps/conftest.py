import pytest
from killing import Server


@pytest.fixture(scope="session")
def server():
    with Server() as running:
        yield running
