"""Saved here, loaded there: one process checks the checkpoints of many composites, data-driven starts not re-run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composites import LARGER, of, sampled, sized
from safetensors.torch import save_file
from support import Net, Regression, adamw, attached, perturb, train

import lorafactory

HERE = Path(__file__).parent


def write(spelling: str, folder: Path, transposed: bool) -> None:
    """A trained and perturbed adapter, where nothing else decides the ranks with a pair of another rank than configured."""
    torch.manual_seed(0)
    base = Net(transposed)
    data, x = Regression(base), torch.randn(3, 5, 24)
    adapted = attached(spelling, base, data, trained_modules=["head"])
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    pairs = [low for _, low in adapted.adapter.low_ranks()]
    if pairs and "budget" not in adapted.adapter.parts and pairs[0].rank > 2:
        pairs[0].keep(torch.tensor([0, 2]))
    perturb(adapted.adapter, 0.1)
    adapted.eval().save(folder / "adapter")
    save_file({"x": x, "y": adapted(x).detach().contiguous()}, folder / "expected.safetensors")
    trained = sorted(n for n, p in adapted.adapter.named_parameters() if p.requires_grad)
    (folder / "about.json").write_text(json.dumps({"variant": spelling, "transposed": transposed, "trained": trained}))
    save_file(adapted.detach().state_dict(), folder / "base.safetensors")


def check(spellings: list[str], folder: Path) -> dict[str, str]:
    for i, spelling in enumerate(spellings):
        place = folder / spelling
        place.mkdir()
        write(spelling, place, transposed=bool(i % 2))
    paths = [str(HERE), str(HERE.parent), str(Path(lorafactory.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "child.py", folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_singles_and_pairs_load_in_a_new_process(tmp_path):
    assert check(sized(1, 2), tmp_path) == {}


@pytest.mark.slow
def test_larger_composites_load_in_a_new_process(tmp_path):
    assert check([*of(3)[::9], *sampled(4, LARGER)], tmp_path) == {}
