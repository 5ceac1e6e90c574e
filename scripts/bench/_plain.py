"""A fine-tuning script as one writes it with PEFT: one process, one run for each seed, metrics printed as JSON.

    python scripts/bench/_plain.py MODEL_FOLDER DATA_FOLDER STEPS SEED [SEED …]

The same work as `lorafactory run` on bbc_news as sweep.py sizes it: LoRA of rank 8 on every linear layer and a head, 200
training rows, 200 and 250 scored ones, 48 tokens, AdamW with a linear schedule."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

TRAIN, SELECTION, TEST, TOKENS, BATCH, SCORED = 200, 200, 250, 48, 16, 64
LAYERS = ["query", "key", "value", "dense"]


def articles(folder: Path, seed: int) -> tuple[list[tuple[str, int]], int]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and any(p.glob("*.txt")))
    rows = [(f.read_text(errors="replace"), k) for k, c in enumerate(classes) for f in sorted(c.glob("*.txt"))]
    random.Random(seed).shuffle(rows)
    return rows[: TRAIN + SELECTION + TEST], len(classes)


def run(model_folder: str, data: Path, steps: int, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    rows, classes = articles(data, 0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=classes)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS, modules_to_save=["classifier"], task_type="SEQ_CLS",
                             exclude_modules=["classifier"])  # fmt: skip
    model = peft.get_peft_model(base, config)

    def batch(chosen: list[tuple[str, int]]) -> dict[str, Any]:
        texts, labels = zip(*chosen, strict=True)
        made = tokenizer(list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        return {**made, "labels": torch.tensor(labels)}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    model.train()
    for step in range(steps):
        at = step * BATCH % TRAIN
        model(**batch(rows[at : min(at + BATCH, TRAIN)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    found = {}
    for name, split in (("selection", rows[TRAIN : TRAIN + SELECTION]), ("test", rows[TRAIN + SELECTION :])):
        hits = 0
        for at in range(0, len(split), SCORED):
            made = batch(split[at : at + SCORED])
            labels = made.pop("labels")
            with torch.no_grad():
                hits += int((model(**made).logits.argmax(-1) == labels).sum())
        found[name] = hits / len(split)
    return found


if __name__ == "__main__":
    model_folder, data, steps, *seeds = sys.argv[1:]
    for seed in seeds:
        print(json.dumps(run(model_folder, Path(data), int(steps), int(seed))), flush=True)
