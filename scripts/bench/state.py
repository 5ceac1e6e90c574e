"""What an optimiser keeps between two steps, in bytes, on a model's linear layers: results/bench/state.md

    python scripts/bench/state.py [--model minilm] [--rank 8] [--out results/bench]

It counts the tensors in the optimiser's state after two steps, so a busy machine changes nothing. Exit status: 0; 2 for a
wrong call."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from _sides import adamw, batches

from lorafactory import attach, describe, registry, targets
from lorafactory.errors import UserError

MIB = 2**20
# spelling, options, what it is called, its numbers for a weight [m, n]
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("lora", {}, "LoRA, AdamW", "2 r (m + n)"),
    ("lora_fa", {}, "LoRA-FA, AdamW on B", "2 r m"),
    ("lora_rite", {}, "LoRA-RITE", "2 r (m + n) + 2 r²"),
    ("lora_pro", {}, "LoRA-Pro, Adam form", "2 m n"),
    ("full", {}, "full weights, AdamW", "2 m n"),
    ("galore", {"rank": 8}, "GaLore, AdamW", "2 r max(m, n) + r min(m, n)"),
    ("galore", {"rank": 8, "bits": 8}, "GaLore, AdamW in 8 bits", "(2 r max(m, n)) / 4 + r min(m, n)"),
    ("flora_opt", {"rank": 8}, "Flora", "r max(m, n) + m + n"),
]


def measured(base: Any, spelling: str, dynamics: dict[str, Any], rank: int) -> dict[str, int]:
    """Trained matrices' numbers and the bytes of their state."""
    options: dict[str, Any] = {"target_modules": "all-linear", "trained_modules": targets.head_modules(base)}
    if "rank" in registry.parse(spelling)[0].Config.__dataclass_fields__:
        options["rank"] = rank
    if dynamics:
        options["dynamics"] = dynamics | {"rank": rank}
    adapted = attach(copy.deepcopy(base), spelling, seed=0, **options).train()
    optimizer = adapted.optimizer(adamw, 2)
    for batch in batches(base)[:2]:
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    matrices = {p for p in adapted.adapter.deltas.parameters() if p.requires_grad and p.dim() == 2}
    kept = [t for p in matrices for t in optimizer.state.get(p, {}).values() if torch.is_tensor(t) and t.dim()]
    return {"trained": sum(p.numel() for p in matrices), "bytes": sum(t.numel() * t.element_size() for t in kept)}


def page(found: list[tuple[str, str, dict[str, int]]], model: str, rank: int) -> str:
    lora = found[0][2]["bytes"]
    lines = [
        "# Optimiser state in bytes",
        "",
        f"`python scripts/bench/state.py --model {model} --rank {rank}`: all linear layers of {model}'s blocks, float32. Counted",
        "are the tensors that an optimiser keeps for trained matrices after two steps: moments, bases and projectors. Weights,",
        "gradients and what a step forms in passing are not, nor vectors (biases) and the head, which take plain AdamW.",
        "",
        "| method | numbers of state for a weight [m, n] | trained | state, MiB | of LoRA's |",
        "|---|---|---|---|---|",
    ]
    for label, numbers, row in found:
        size = f"{row['bytes'] / MIB:.2f}"
        lines.append(f"| {label} | {numbers} | {row['trained']:,} | {size} | {row['bytes'] / lora:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="preset of configs/model")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    chosen = parser.parse_args(arguments)
    registry.discover()
    try:
        base = describe.base_model(chosen.model)
        found = [(label, numbers, measured(base, s, d, chosen.rank)) for s, d, label, numbers in CASES]
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "state.md").write_text(page(found, chosen.model, chosen.rank))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
