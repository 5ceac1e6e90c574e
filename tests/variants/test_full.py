import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, cloned, close, loss, perturb, roberta_base, same, train
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lorafactory import UserError, attach

SIZES = dict(n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(0))


def bert():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)).eval()


def gpt2():
    """Its input and output embeddings are one parameter."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, initializer_range=0.2, **SIZES)).eval()


def stepped(model, loss_of, optimizer=None):
    """The model after one step of plain SGD with a momentum that does not matter yet."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(params, lr=0.1)
    value = loss_of(model)
    value.backward()
    optimizer.step()
    return float(value.detach())


@pytest.mark.parametrize("make", [Net, bert, gpt2])
def test_one_sgd_step_is_pytorchs_own(make):
    """To the last bit, on an unwrapped copy; Conv1D multiplies in another order, so GPT-2 only nearly."""
    plain = make()
    x = torch.randn(3, 24)
    loss_of = (lambda m: m(x).square().mean()) if make is Net else lambda m: m(IDS, labels=labels(m)).loss
    equal = torch.equal if make is not gpt2 else close
    adapted = attach(copy.deepcopy(plain), "full", seed=0)
    assert not any(p.requires_grad for p in adapted.model.parameters())
    before = cloned(plain.state_dict())
    optimizer = adapted.optimizer(lambda groups: torch.optim.SGD(groups, lr=0.1), 1)
    ours, theirs = stepped(adapted, loss_of, optimizer), stepped(plain, loss_of)
    assert ours == pytest.approx(theirs, rel=1e-6) and (make is gpt2 or ours == theirs)
    adapted.merge()
    after = adapted.model.state_dict()
    assert all(equal(t, plain.state_dict()[n]) for n, t in after.items())
    assert sum(not torch.equal(t, before[n]) for n, t in after.items()) > 0.8 * len(before)
    assert same(adapted.detach().state_dict(), before)


def labels(model):
    return IDS[:, 0] % 3 if hasattr(model, "classifier") else IDS


def test_counts():
    """Every parameter once: RoBERTa with a head, its linear layers alone, GPT-2 with one embedding for both ends."""
    assert attach(copy.deepcopy(roberta_base()), "full").cost() == {
        "adapter_parameters": 124_647_170 - 592_130,
        "head_parameters": 592_130,
        "total_parameters": 124_647_170,
    }
    linear = attach(copy.deepcopy(roberta_base()), "full", target_modules="all-linear").cost()
    assert linear["adapter_parameters"] == 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768)
    plain = gpt2()
    assert attach(copy.deepcopy(plain), "full").num_trainable() == sum(p.numel() for p in plain.parameters())


CHILD = """
import json, sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel
import lorafactory
sizes, ids, folder = json.loads(sys.argv[1])
model = GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes)).eval()
model.load_state_dict(torch.load(folder + "/base.pt"))
adapted = lorafactory.load(model, folder + "/adapter")
y = adapted(torch.tensor(ids)).logits.double().sum().item()
wte, head = (adapted.adapter.deltas[k].module.weight for k in ("transformer/wte", "lm_head"))
plain = adapted.bake()
print(json.dumps([y, wte is head, plain.lm_head.weight is plain.transformer.wte.weight,
                  plain(torch.tensor(ids)).logits.double().sum().item()]))
"""


def test_tied_embeddings_stay_tied_in_a_new_process(tmp_path):
    base = gpt2()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    adapted = attach(base, "full", seed=0)
    wte, head = (adapted.adapter.deltas[k].module.weight for k in ("transformer/wte", "lm_head"))
    assert wte is head
    perturb(adapted.adapter, 0.3)
    y = adapted(IDS).logits.double().sum().item()
    adapted.save(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter.safetensors").stat().st_size
    assert size < 4 * adapted.num_trainable() + 20_000, "the embedding is stored once"
    told = json.dumps([SIZES, IDS.tolist(), str(tmp_path)])
    out = subprocess.run([sys.executable, "-c", CHILD, told], capture_output=True, text=True, check=True, env=threads())
    loaded, tied, still, baked = json.loads(out.stdout.splitlines()[-1])
    assert tied and still and loaded == y and baked == pytest.approx(y, rel=1e-4)


MEMORY = """
import sys
import torch
import torch.nn as nn
import lorafactory
from lorafactory.memory import Peak
lorafactory.registry.config("full")
width, depth = 2300, 5  # 106 MB in float32
layers = [nn.Linear(8, 8)]
layers[0](torch.randn(2, 8)).sum().backward()  # what torch sets up once
make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[sys.argv[2]]
peak = Peak(torch.device("cpu"))
model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())))
if sys.argv[1] == "full":
    model = lorafactory.attach(model, "full")
    optimizer = model.optimizer(lambda groups: make(groups, lr=1e-3), 3)
else:
    optimizer = make(model.parameters(), lr=1e-3)
x = torch.randn(4, width)
for _ in range(3):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(peak.read())
"""


def threads():
    # malloc raises its mmap threshold as it goes; fixed, freed tensors go back and the peak does not depend on luck
    fixed = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    return {**os.environ, **fixed, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_peak_memory_is_that_of_plain_fine_tuning(optimizer):
    """The base's own numbers wait in a file. Bytes beyond an empty process: torch itself must not flatter the ratio."""
    peak = {}
    for kind in ("plain", "full"):
        command = [sys.executable, "-c", MEMORY, kind, optimizer]
        peak[kind] = int(subprocess.run(command, capture_output=True, text=True, check=True, env=threads()).stdout)
    assert peak["plain"] > 2 * 106e6
    assert peak["full"] <= 1.1 * peak["plain"], peak


def test_a_tie_is_trained_whole_or_not_at_all():
    """A merged copy of one end would change the other: refused for a part of a tie, and passed over by `all`."""
    for options in ({"target_modules": ["wte"]}, {"target_modules": ["c_fc"], "trained_modules": ["lm_head"]}):
        with pytest.raises(UserError, match="cannot be trained alone, it shares its weight with"):
            attach(gpt2(), "full", **options)
    assert attach(gpt2(), "full", target_modules=["wte", "lm_head"]).num_trainable() == 50 * 16
    with pytest.raises(UserError, match="it shares its weight with transformer.wte"):
        attach(gpt2(), "lora", rank=2, target_modules=["lm_head"])
    assert "lm_head" not in attach(gpt2(), "lora", rank=2, target_modules="all").adapter.deltas
    masked = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    assert not attach(masked, "lora", rank=2).adapter.trained, "its head holds the output embedding"


def test_only_linear_layers():
    base = Net()
    data, norm = Regression(base), cloned(base.norm.state_dict())
    adapted = attached("full", base, data, target_modules="all-linear", trained_modules=["head"])
    train(adapted, data, adapted.optimizer(adamw, 3), steps=3)
    adapted.merge()
    assert same(adapted.model.norm.state_dict(), norm) and not torch.equal(adapted.model.fc3.weight, base.fc3.weight)


def test_a_half_precision_base_trains_in_float32():
    """A step of 1e-4 on weights near 1 is lost in bfloat16; the trained copy keeps it."""
    base = Net().bfloat16()
    adapted = attach(copy.deepcopy(base), "full", seed=0)
    data = Regression(base)
    optimizer = adapted.optimizer(lambda g: torch.optim.SGD(g, lr=1e-4), 1)
    loss(adapted, data(1)[0]).backward()
    optimizer.step()
    dense = adapted.adapter.deltas["fc1"].dense
    assert dense.dtype == torch.float32 and (dense != base.fc1.weight.float()).float().mean() > 0.9
    assert adapted(data(1)[0]["x"]).dtype == torch.bfloat16


def test_the_base_comes_back_from_its_file():
    base = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    before, x = cloned(base.state_dict()), torch.randn(3, 6)
    y0 = base(x).detach()
    adapted = attach(base, "full")
    perturb(adapted.adapter, 0.3)
    y = adapted(x)
    with adapted.disabled():
        assert torch.equal(adapted(x), y0) and same(adapted.model.state_dict(), before)
    assert torch.equal(adapted(x), y) and not torch.equal(y, y0)
    twin = copy.deepcopy(adapted)
    assert same(adapted.detach().state_dict(), before) and same(twin.detach().state_dict(), before)
