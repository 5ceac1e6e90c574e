"""A plain PyTorch loop on a module of your own: attach, train, end, save, load, merge. Runs offline in seconds."""

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import lorafactory

STEPS = 60
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
teacher = copy.deepcopy(base)
with torch.no_grad():  # what there is to learn: a change of low rank
    for layer in (teacher[0], teacher[2]):
        layer.weight += 0.2 * torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features)
x = torch.randn(256, 16)
y = teacher(x).detach()

# DoRA over LoRA whose ranks compete for a budget; the last layer is trained whole
adapted = lorafactory.attach(base, "dora+adalora", rank=6, target_modules=["0", "2"], trained_modules=["4"], seed=0)
print(f"{adapted.num_trainable():,} numbers train, {adapted.cost()['head_parameters']:,} of them the head's")

# step() runs the life cycle: the budget falls while the optimiser steps
optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-2), total=STEPS)
for step in range(STEPS):
    batch = torch.randint(0, len(x), (64,))
    loss = F.mse_loss(adapted(x[batch]), y[batch])
    (loss + adapted.penalty()).backward()  # the penalty is 0.0 for most variants
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step:3}  loss {loss.item():.4f}")
adapted.end()  # what the variant does once training is over: here, drop the masked ranks
print(f"at the end    {F.mse_loss(adapted(x), y).item():.4f}, ranks {[a['rank'] for a in adapted.adapter.describe()]}")

with tempfile.TemporaryDirectory() as place:
    folder = adapted.save(Path(place) / "adapter")
    plain = adapted.detach()  # the base, bit for bit
    adapted = lorafactory.load(plain, folder)
    print(f"loaded        {F.mse_loss(adapted(x), y).item():.4f}")
    with adapted.disabled():
        print(f"disabled      {F.mse_loss(adapted(x), y).item():.4f}")
    merged = adapted.bake()  # a plain nn.Sequential
    print(f"merged        {F.mse_loss(merged(x), y).item():.4f}")
