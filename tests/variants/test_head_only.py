import copy

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from support import Net, Regression, adamw, cloned, close, loss, roberta_base, same, train

from lorafactory import UserError, attach


class Dropping(Net):
    """A base with dropout and with statistics that training would move."""

    def __init__(self):
        super().__init__()
        self.drop, self.batch = nn.Dropout(0.5), nn.BatchNorm1d(24)

    def features(self, x):
        x = torch.tanh(self.norm(self.fc2(torch.tanh(self.fc1(x)))))
        return torch.tanh(self.fc3(self.drop(self.batch(x.flatten(0, -2)).view(x.shape))))

    def forward(self, x):
        return self.head(self.features(x))


def test_the_backbone_only_computes_features():
    base = Dropping()
    data, before = Regression(base.eval()), cloned(base.state_dict())
    adapted = attach(copy.deepcopy(base), "head_only", trained_modules=["head"]).train()
    x = torch.randn(6, 5, 24)
    assert torch.equal(adapted(x), adapted(x)), "no dropout in front of the head"
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == [
        "adapter.trained.head.module.weight",
        "adapter.trained.head.module.bias",
    ]
    train(adapted, data, adapted.optimizer(adamw, 4), steps=4)
    assert not torch.equal(adapted(x), base(x))
    assert same(adapted.detach().state_dict(), before)


def test_training_ends_where_the_closed_form_does():
    """Least squares on cached features, and the same by the trainer's own loss: two evaluations of one probe."""
    base = Dropping().eval()
    data = Regression(base)
    batches = data(8)
    with torch.no_grad():
        h = torch.cat([base.features(b["x"]).flatten(0, 1) for b in batches])
        y = torch.cat([b["y"].flatten(0, 1) for b in batches])
    h = torch.cat([h, torch.ones(len(h), 1)], 1)
    best = torch.linalg.lstsq(h.double(), y.double()).solution
    want = float((h.double() @ best - y.double()).square().mean())
    adapted = attach(base, "head_only", trained_modules=["head"]).train()
    optimizer = torch.optim.LBFGS([p for p in adapted.parameters() if p.requires_grad], max_iter=200)

    def closure():
        optimizer.zero_grad()
        total = sum(loss(adapted, b) for b in batches) / len(batches)
        total.backward()
        return total.detach()

    before = float(closure())
    optimizer.step(closure)
    assert float(closure()) == pytest.approx(want, rel=1e-3) and want < 0.9 * before


def test_the_checkpoint_holds_the_head_alone(tmp_path):
    adapted = attach(Net(), "head_only", trained_modules=["head"])
    adapted.save(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert {n: list(t.shape) for n, t in saved.items()} == {
        "trained.head.module.weight": [8, 24],
        "trained.head.module.bias": [8],
    }


def test_count_and_refusals():
    cost = attach(copy.deepcopy(roberta_base()), "head_only").cost()
    assert (cost["adapter_parameters"], cost["head_parameters"]) == (0, 768 * 768 + 768 + 2 * 768 + 2)
    with pytest.raises(UserError, match="no meaning"):
        attach(Net(), "head_only", target_modules=["fc1"])
    with pytest.raises(UserError, match="would train nothing"):
        attach(Net(), "head_only", trained_modules=[])


def test_merge_writes_the_head():
    base, x = Net(), torch.randn(3, 24)
    adapted = attach(copy.deepcopy(base), "head_only", trained_modules=["head"])
    with torch.no_grad():
        adapted.adapter.heads()[1].add_(1.0)
    plain = adapted.bake()
    assert close(plain(x), base(x) + 1)
