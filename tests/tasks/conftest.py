"""A cache of the tests' own, the real data where they lie, a small source, the toy task."""

import os
from pathlib import Path

import pytest
from samples import loaded, write_csv

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFACTORY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def data():
    folder = Path(os.environ.get("LORAFACTORY_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "glue").is_dir():
        pytest.skip(f"no real data in {folder}: set LORAFACTORY_DATA")
    return folder


@pytest.fixture
def source(tmp_path):
    """train.csv of 60 rows in three classes and test.csv of 30."""
    names = ["cat", "dog", "eel"]
    for split, size in (("train", 60), ("test", 30)):
        write_csv(tmp_path / f"{split}.csv", [(f"{split} {i} {names[i % 3]}", names[i % 3]) for i in range(size)])
    return tmp_path


@pytest.fixture
def toy():
    return loaded("toy", name="toy")
