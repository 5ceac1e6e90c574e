"""Where a run was made: the commit only if it names the code."""

import subprocess
import time

import pytest

from lorafactory import environment as module
from lorafactory.environment import checkout, environment, source
from lorafactory.version import __version__


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path):
    for name in ("lorafactory/run.py", "configs/config.yaml", "configs/table/t.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q")
    return tmp_path


def test_what_makes_a_tree_dirty(tree):
    assert checkout(tree) == {"commit": None, "dirty": True}  # no commit names it yet
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    clean = checkout(tree)
    assert len(clean["commit"]) == 40 and not clean["dirty"]
    (tree / "README.md").write_text("2")
    (tree / "results").mkdir()
    (tree / "results" / "new.json").write_text("2")
    (tree / "configs/table/mine.yaml").write_text("2")
    assert checkout(tree) == clean  # none of these changes a run
    for name in ("lorafactory/run.py", "lorafactory/new.py", "configs/config.yaml"):
        before = (tree / name).read_text() if (tree / name).exists() else None
        (tree / name).write_text("2")
        assert checkout(tree)["dirty"], name
        (tree / name).unlink() if before is None else (tree / name).write_text(before)
    assert checkout(tree) == clean


def test_the_source_tells_dirty_trees_apart(tree):
    first = source(tree)
    (tree / "configs/table/t.yaml").write_text("2")
    (tree / "README.md").write_text("2")
    assert source(tree) == first
    (tree / "lorafactory/run.py").write_text("2")
    assert source(tree) != first


def test_somebody_elses_repository_is_not_ours(tree):
    inside = tree / "venv" / "site-packages"
    inside.mkdir(parents=True)
    assert checkout(inside) == {"commit": None, "dirty": False}


def test_without_git_a_checkout_is_dirty(tree, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert checkout(tree) == {"commit": None, "dirty": True}


def test_it_is_complete_and_cheap():
    for cached in (module._code, module._packages, module._cpu):
        cached.cache_clear()
    began = time.perf_counter()
    made = environment("cpu")
    assert time.perf_counter() - began < 1  # 0.03 s where nothing else runs
    assert {"commit", "dirty", "source", "device", "cpu", "threads", "python", "platform"} < set(made)
    assert made["packages"]["lorafactory"] == __version__ and {"torch", "transformers"} < set(made["packages"])
    assert made["device"] == "cpu" and made["cpu"] and made["threads"] >= 1
