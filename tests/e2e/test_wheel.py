"""The wheel, installed outside the repository, runs with the configs that it carries."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from runs import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    made = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_code_configs_a_small_base_and_licence_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.endswith("licenses/LICENSE") for n in names)
    data = {f"lorafactory/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    code = {str(p.relative_to(ROOT)) for p in (ROOT / "lorafactory").rglob("*.py")}
    base = {str(p.relative_to(ROOT)) for p in (ROOT / "lorafactory/vit_mnist").iterdir()}
    assert {n for n in names if ".dist-info" not in n} == data | code | base


def test_it_runs_outside_the_repository(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-qq",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(pip, check=True, timeout=300)
    ours = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    (site / "what_it_needs.pth").write_text(f"{ours}\n")  # after its own folder, so that the wheel comes first
    ran = subprocess.run(
        [str(python.with_name("lorafactory")), "run", "task=toy", "model=tiny", "variant=dora", "train.steps=2"],
        cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "results" / "runs" / "adhoc" / "dora").is_dir(), "a wheel is no dirty checkout"
    where = [str(python), "-c", "import lorafactory; print(lorafactory.__file__)"]
    assert (
        str(site)
        in subprocess.run(where, cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True).stdout
    )
