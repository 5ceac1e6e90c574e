import pytest
from fabricate import Results


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results")
