"""What `make setup` and pip rely on: declared, pinned, written once; and what git is to leave out."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from places import ROOT, text

import lorafactory
from lorafactory import paths

PROJECT = tomllib.loads(text("pyproject.toml"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def canonical(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def imports(path):
    """(top-level package, whether importing the module imports it)"""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name.partition(".")[0], node in tree.body) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], node in tree.body


def test_every_import_is_declared():
    owners, needed = packages_distributions(), {canonical(d) for d in PROJECT["dependencies"]}
    optional = needed | {canonical(d) for extra in EXTRAS.values() for d in extra}
    ours = {"lorafactory", *sys.stdlib_module_names}
    undeclared = {
        f"{path.name}: {package}"
        for path in (ROOT / "lorafactory").rglob("*.py")
        for package, always in imports(path)
        if package not in ours
        and not {canonical(d) for d in owners.get(package, [package])} & (needed if always else optional)
    }
    assert not undeclared


def test_every_dependency_is_pinned_but_torch():
    lines = [line for line in text("constraints.txt").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    declared = {canonical(d) for extra in (PROJECT["dependencies"], *EXTRAS.values()) for d in extra}
    assert declared - {line.partition("==")[0] for line in lines} == {"torch", "triton", "lorafactory"}


def test_the_version_is_written_once():
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert text("lorafactory/version.py").strip() == f'__version__ = "{lorafactory.__version__}"'


def test_make_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.M).group(1).split()
    assert [line.split()[0] for line in make(ROOT).stdout.splitlines()] == targets
    for target in targets:
        assert make(ROOT, "--dry-run", target).returncode == 0


@pytest.mark.parametrize("python", ["no-such-python", "old"])
def test_an_unfit_python_is_refused_in_one_line(python, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    if python == "old":  # answers as 3.10 would
        python = tmp_path / "python3.10"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 0); $2"\n')
        python.chmod(0o755)
    ended = make(tmp_path, "setup", f"PYTHON={python}")
    said = [line for line in ended.stderr.splitlines() if not line.startswith("make: ***")]
    assert ended.returncode and len(said) == 1 and ("3.11 or newer" in said[0] or "no-such-python" in said[0])
    assert not (tmp_path / ".venv").exists()


def make(folder, *arguments):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_ci_is_a_script_that_can_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0


def test_git_leaves_out_what_runs_leave_but_keeps_records():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    left = ["results/demo/runs/a.json", "results/scratch/a.json", "results/adapters/a", "results/runs/e/v/.a.json.lock"]
    kept = ["results/runs/e/v/a.json", "results/runs/e/v/a.predictions.json.gz", "results/tables/demo.png"]
    asked = ["git", "check-ignore", "--no-index", *left, *kept]
    assert subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.split() == left


def test_a_checkout_uses_its_own_configs_and_an_installed_package_those_it_ships(tmp_path, monkeypatch):
    assert paths.configs() == ROOT / "configs"
    package = tmp_path / "site-packages" / "lorafactory"
    (package / "configs").mkdir(parents=True)
    (tmp_path / "site-packages" / "configs").mkdir()  # some other package's
    monkeypatch.setattr(paths, "__file__", str(package / "paths.py"))
    assert paths.configs() == package / "configs"
