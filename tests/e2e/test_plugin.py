"""A new variant in one file: the README's own example, as an installed package, with no other edit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment, lorafactory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A folder for PYTHONPATH that holds the package and its entry point, as pip would leave them."""
    (code,) = re.findall(r"```python\n([^`]*@register[^`]*)```", (ROOT / "README.md").read_text())
    folder = tmp_path_factory.mktemp("site")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").touch()
    (folder / "my_package" / "scaled.py").write_text(code)
    about = folder / "my_package-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[lorafactory.variants]\nrow_scale = my_package.scaled\n")
    return {"PYTHONPATH": str(folder)}


def test_it_is_as_short_as_promised(plugin):
    assert len((Path(plugin["PYTHONPATH"]) / "my_package" / "scaled.py").read_text().splitlines()) <= 30


def test_it_trains_composes_and_stands_in_the_table(plugin, tmp_path):
    assert "row_scale" in lorafactory("variants", **plugin).stdout
    ran = lorafactory(
        "run", "-m", "variant=row_scale,row_scale+dora", "seed=0,1", "task=toy", "model=tiny", "train.steps=4",
        "variant.start=0.01", "results.experiment=mine", f"results.folder={tmp_path}", **plugin,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 ran, 0 found, 0 failed, 0 diverged" in ran.stdout
    spec = tmp_path / "mine.yaml"
    spec.write_text("experiments: [mine]\ntasks: [toy]\nseeds: [0, 1]\n")
    table = lorafactory("table", str(spec), "--results", str(tmp_path), "--with-scratch", **plugin)
    assert table.returncode == 0, table.stderr
    assert "row_scale" in table.stdout and "row_scale+dora" in table.stdout


def test_it_passes_the_contract(plugin):
    passed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract", "-k", "row_scale"],
        cwd=ROOT, env=environment(**plugin), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert passed.returncode == 0, passed.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", passed.stdout).group(1)) >= 3


def test_a_plugin_that_cannot_be_imported_does_not_vanish(plugin, tmp_path):
    about = tmp_path / "broken-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[lorafactory.variants]\nbroken = not_there.at_all\n")
    ended = lorafactory("variants", PYTHONPATH=str(tmp_path))
    assert ended.returncode != 0
    assert "not_there" in ended.stderr
