"""Where algebra avoids it, training forms no matrix of a layer's own shape [d_out, d_in], forward or backward."""

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorafactory import attach
from lorafactory.kernels import norms

D_IN, D_OUT = 29, 31
FAST = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "map": {"rank": 4},
    "vera": {"rank": 4},
    "vera+map": {"rank": 4},
    "loha+map": {"rank": 2},
    "vera+dora": {"rank": 4},
    "lotr": {"rank": 4, "left": "svd", "core": "svd", "right": "svd"},
    "lotr+dora": {"rank": 4},
    "hydra_lora": {"rank": 4},
    "molora": {"rank": 4},
    "dora+molora": {"rank": 4},
    "hydra": {"rank": 4},
    "ia3": {"target_modules": ["0"], "feedforward_modules": ["0"]},
    "bitfit": {},
    "loha": {"rank": 2},  # of rank 4 as a pair
    "loha+dora": {"rank": 2},
    "lokr": {"rank": 4},
    "oft": {"block_size": 29},
    "hra": {"rank": 4},
    "boft": {"block_size": 29},
    "delora": {"rank": 4, "anchored": True},
    "miss": {"rank": 4},
    "miss+dora": {"rank": 4},
    "randlora": {"rank": 4},
    "vb_lora": {"rank": 4, "num_vectors": 6},  # of length 1
    "lora_xs": {"rank": 4},
    "lora_xs+dora": {"rank": 4},
    "mos": {"shards": 1},
    "melora": {"rank": 4, "minis": 1},  # 29 and 31 have no other divisor
    "moslora": {"rank": 4},
    "moslora+dora": {"rank": 4},
    "e8_lora": {"rectangle": "fold"},
    "leech_lora": {"tail": "cut"},
    "block_lora": {"rank": 4, "arms": 3},
    "rasa": {"rank": 4},
    "rasa+dora": {"rank": 4},
    "denselora": {"rank": 4},
    "cg_lora": {},
    "queryable_lora": {"rank": 4},
    "tied_lora": {"rank": 4},
    "svf": {},
    "svft": {"pattern": "banded"},
    "salt": {"rank": 4},
    "nola": {"rank": 4, "num_bases": 8},
    "krona": {},  # [1, 31] kron [29, 1]
    "fourierft": {"n": 1},
    "tera": {"ratio": 0.5},
    "loretta": {"rank": 4},
    "tenslora": {"rank": 4, "mode": "att_qkv_depth", "heads": 31},
    "tenslora+dora": {"rank": 4},
    "waveft": {"n": 1, "wavelet": "db2"},
}


class Shapes(TorchDispatchMode):
    """Operations that fill new memory of the shape of W or of its transpose."""

    def __init__(self, adapted):
        super().__init__()
        frozen = [adapted.model[0].weight, *adapted.buffers()]
        self.frozen, self.seen = {t.untyped_storage().data_ptr() for t in frozen}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and sorted(t.shape) == [D_IN, D_OUT] and not self.is_view(t):
                self.seen.append(str(func))
        return out

    def is_view(self, t):
        return t.untyped_storage().data_ptr() in self.frozen


def formed(spelling, options):
    torch.manual_seed(0)
    adapted = attach(nn.Sequential(nn.Linear(D_IN, D_OUT)), spelling, **options).train()
    x = torch.randn(7, D_IN, requires_grad=True)
    with Shapes(adapted) as shapes:
        adapted(x).square().sum().backward()
    return shapes.seen


@pytest.mark.parametrize("spelling", FAST)
def test_no_dense_matrix_is_formed(spelling, monkeypatch):
    monkeypatch.setattr(norms, "CACHED", 8 * D_IN)  # norms are taken of some rows at a time, here fewer than the layer has
    assert formed(spelling, FAST[spelling]) == []


def test_the_probe_sees_one():
    assert formed("full+dora", {})
