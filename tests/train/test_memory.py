"""Out of memory: what is lowered to fit, in one line; what ran is on record as failed."""

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import configured

from lorafactory import models, record, run
from lorafactory.errors import UserError
from lorafactory.tasks.toy import Toy

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB free"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:132] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.fixture(autouse=True)
def fresh():
    yield
    models._loaded.clear()
    AcceleratorState._reset_state()


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_what_to_lower_is_said(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(Toy, "loss", full)
    with pytest.raises(UserError) as e:
        run.run(configured(f"results.folder={tmp_path}", "train.batch_size=12", "train.micro_batch_size=6"))
    said = str(e.value)
    assert "\n" not in said and "now 6 rows" in said and "train.batch_size=12" in said and "gradient_checkpointing=true" in said
    (path,) = (tmp_path / "scratch").rglob("toy-*.json")
    assert record.read(path)["status"] == "failed"


def test_another_error_is_itself(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Toy, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run.run(configured(f"results.folder={tmp_path}"))
