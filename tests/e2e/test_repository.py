"""The repository keeps its own rules."""

import re
import subprocess
from pathlib import Path

import pytest

from lorafactory import registry

ROOT = Path(__file__).resolve().parents[2]


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\n") if name]


def test_no_machine_path_and_no_registry_host():
    machine = re.compile("/" + r"(work|farm|root)/|index" + "-url|pypi" + r"\.org")
    text = [p for p in tracked() if p.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".json", "") and p.exists()]
    found = [f"{p}: {m.group()}" for p in text for m in machine.finditer(p.read_text(errors="replace"))]
    assert not found


def test_readmes_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M))
    assert named and named <= targets


def test_no_variants_name_outside_its_file():
    """Law 4, in code: a name in quotes."""
    names = [n for n in registry.names()]
    code = [p for p in tracked("lorafactory/*.py") if "variants" not in p.parts]
    found = [f"{p.name}: {n}" for p in code for n in names if re.search(f"[\"']{n}[\"']", p.read_text())]
    assert not found


def test_every_variant_has_a_file_and_tests_of_its_own():
    for name in registry.names():
        assert (ROOT / "lorafactory" / "variants" / f"{name}.py").exists()
        assert (ROOT / "tests" / "variants" / f"test_{name}.py").exists(), name


def test_variants_and_tasks_do_not_know_the_loop():
    for p in tracked("lorafactory/variants/*.py", "lorafactory/tasks/*.py", "lorafactory/tables/*.py"):
        assert not re.search(r"^from \.\.?(run|train|launch|cli)\b", p.read_text(), re.M), p


def test_ci_runs_what_the_readme_names():
    assert "make lint types test" in (ROOT / ".ci" / "run").read_text()
