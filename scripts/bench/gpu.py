"""DoRA's kernels on a GPU, beside their limits: what the device copies a second, PEFT, the dense form, torch.compile.

    python scripts/bench/gpu.py micro|layer|stack [--ranks 16,64] [--official FOLDER] [--out results/bench]

`micro`: the norm and the composition alone; `layer`: one linear layer; `stack`: decoder layers of an 8B model with random
weights. Each takes less than ten minutes on an H100, needs no hub, prints its table last and writes gpu_<what>.json. PEFT's
rows need peft. --official: a checkout of sockeye44/dorafactors, whose patched PEFT takes PEFT's place in `official` rows.
On a CPU it runs small, to show that it runs. Exit status: 0; 2 for a wrong call."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _norms
import torch
import torch.nn as nn
from _main import call, said

from lorafactory import attach, files, kernels
from lorafactory.environment import environment
from lorafactory.errors import UserError

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16
WARMUP, REPEATS = (10, 50) if CUDA else (1, 3)
FUSED = "triton" if CUDA else "eager"
MICRO_BATCHES = 8


def seconds(call: Callable[[int], Any], repeats: int = REPEATS) -> dict[str, float]:
    """Median, 10th and 90th percentile. call(i): the i-th of several inputs, so that no cache holds them."""
    for i in range(WARMUP):
        call(i)
    found = []
    for i in range(repeats):
        if CUDA:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(i)
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call(i)
            found.append(time.perf_counter() - began)
    cuts = statistics.quantiles(found, n=10, method="inclusive")
    return {"median": statistics.median(found), "low": cuts[0], "high": cuts[-1]}


def peak(call: Callable[[int], Any]) -> int | None:
    """Bytes on the device beyond what lies there before."""
    if not CUDA:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def limits() -> dict[str, float]:
    """What the device does today: bytes copied and bf16 operations multiplied a second."""
    n = 1 << (29 if CUDA else 22)
    a, b = (torch.randn(n // 2, device=DEVICE).to(DTYPE) for _ in range(2))
    copied = 2 * a.numel() * a.element_size() / seconds(lambda i: a.copy_(b))["median"]
    d = 8192 if CUDA else 512
    w, x = (torch.randn(d, d, device=DEVICE).to(DTYPE) for _ in range(2))
    return {"copy_bytes_per_second": copied, "flops": 2 * d**3 / seconds(lambda i: w @ x)["median"]}


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * shape[-1] ** -0.5).to(dtype)


# the norm and the composition alone


def micro(ranks: list[int]) -> list[dict[str, Any]]:
    today, rows = limits(), []
    sizes = [(4096, 4096), (8192, 8192), (8192, 28672)] if CUDA else [(256, 256)]
    for d_out, d_in in sizes:
        w = draw(d_out, d_in)
        base = kernels.squares(w)
        for r in ranks:
            a, b = draw(r, d_in, dtype=torch.float32), draw(d_out, r, dtype=torch.float32)
            exact = (w.double() + b.double() @ a.double()).norm(dim=1) if d_out * d_in <= 1 << 27 else None
            narrow = a.to(DTYPE), b.to(DTYPE)
            forms: dict[str, Callable[[], torch.Tensor]] = {
                "ours": lambda w=w, a=a, b=b, base=base: kernels.sqnorm(w, a, b, base=base).sqrt(),
                "dense": lambda w=w, a=a, b=b: (w + (b @ a).to(w.dtype)).norm(dim=1),
                "PEFT": lambda w=w, n=narrow: _norms.peft(w, *n),
            }
            least = max(w.numel() * 2 / today["copy_bytes_per_second"] / 2, 2 * w.numel() * r / today["flops"])
            for name, form in forms.items():
                row = {"what": "norm", "shape": [d_out, d_in, r], "form": name, "seconds": seconds(lambda i, f=form: f())}
                row |= {"peak_bytes": peak(lambda i, f=form: f()), "limit": least / row["seconds"]["median"]}
                if exact is not None:
                    row["error"] = float(((form().double() - exact) / exact).abs().max())
                rows.append(row)
    for m, n in [(2048, 4096), (8192, 8192), (16384, 8192)] if CUDA else [(256, 256)]:
        for r in ranks:
            rows += composed(m, n, r, today)
    return [{"what": "device", **today}, *rows]


def composed(m: int, n: int, r: int, today: dict[str, float]) -> list[dict[str, Any]]:
    """Forward, with what the backward pass keeps, and both."""
    y, dz = [draw(m, n) for _ in range(3)], draw(m, n)
    h, b, gain = draw(m, r), draw(n, r, dtype=torch.float32), torch.rand(n, device=DEVICE)
    compiled = torch.compile(kernels.compose)
    rows = []
    for form in ("reference", "eager", *(["triton"] if CUDA else []), "eager, compiled"):
        kernels.choose(form.split(",")[0])
        call = compiled if "compiled" in form else kernels.compose

        def forward(i: int, call: Any = call) -> Any:
            return call(y[i % 3], h, b, gain)

        given = [t.detach().requires_grad_() for t in (y[0], h, b, gain)]

        def both(i: int, call: Any = call, given: Any = given) -> Any:
            return torch.autograd.grad(call(*given), given, dz)

        passes = {"forward": (forward, 2), "forward and backward": (both, 6)}  # [m, n] read or written at least
        for what, (run, reads) in passes.items():
            with torch.set_grad_enabled(what != "forward"):
                found = {"what": f"compose, {what}", "shape": [m, n, r], "form": form, "seconds": seconds(run)}
                found["peak_bytes"] = peak(run)
            moved = reads * m * n * 2 / found["seconds"]["median"]
            rows.append(found | {"limit": moved / today["copy_bytes_per_second"]})
    kernels.choose("auto")
    return rows


# layers


class Stack(nn.Module):
    """Decoder layers as transformers has them, with random weights; the shapes of Qwen3-8B."""

    def __init__(self, depth: int):
        super().__init__()
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

        wide = CUDA
        config = Qwen3Config(hidden_size=4096 if wide else 64, intermediate_size=12288 if wide else 128, num_hidden_layers=depth,
                             num_attention_heads=32 if wide else 4, num_key_value_heads=8 if wide else 2, vocab_size=32,
                             head_dim=128 if wide else 16, attn_implementation="sdpa")  # fmt: skip
        self.model = Qwen3Model(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


def base_of(what: str) -> tuple[nn.Module, list[torch.Tensor]]:
    """A model and three inputs [rows, tokens, d]."""
    torch.manual_seed(0)
    if what == "layer":
        d, tokens = (4096, 8192) if CUDA else (64, 32)
        model: nn.Module = nn.Sequential(nn.Linear(d, d, bias=False))
    else:
        d, tokens = (4096, 4096) if CUDA else (64, 32)
        model = Stack(4 if CUDA else 1)
    return model.to(DEVICE, DTYPE), [torch.randn(1, tokens, d, device=DEVICE).to(DTYPE) for _ in range(3)]


def ours(model: nn.Module, variant: str, rank: int, choice: str, each_step: bool, wide: bool) -> tuple[nn.Module, Any]:
    kernels.choose(choice)
    made = attach(model, variant, rank=rank, target_modules="all-linear" if isinstance(model, Stack) else ["0"])
    if not wide:
        made.adapter.to(DTYPE)
    optimizer = made.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-4, fused=True), total=1 << 30)
    if not each_step:
        kernels.leave(made.adapter.parameters())  # nobody vouches for them: the norm is computed in each pass
        optimizer = torch.optim.AdamW(made.adapter.parameters(), lr=1e-4, fused=True)
    return made, optimizer


def theirs(model: nn.Module, variant: str, rank: int, wide: bool) -> tuple[nn.Module, Any]:
    import peft

    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, use_dora=variant == "dora")
    made: Any = peft.inject_adapter_in_model(config, model)
    if not wide:
        made.to(DTYPE)
    trained = [p for p in made.parameters() if p.requires_grad]
    return made, torch.optim.AdamW(trained, lr=1e-4, fused=True)


SIDES: dict[str, tuple] = {  # name: side, variant, kernels, norm once a step, compiled
    "LoRA, ours": ("ours", "lora", "auto", True, False),
    "DoRA, ours, fused, norm once a step": ("ours", "dora", FUSED, True, False),
    "DoRA, ours, fused, norm each pass": ("ours", "dora", FUSED, False, False),
    "DoRA, ours, eager": ("ours", "dora", "eager", True, False),
    "DoRA, ours, eager, compiled": ("ours", "dora", "eager", True, True),
    "DoRA, dense": ("ours", "dora", "reference", False, False),
    "LoRA, PEFT": ("theirs", "lora", "", False, False),
    "DoRA, PEFT": ("theirs", "dora", "", False, False),
}


def stacked(what: str, ranks: list[int], label: str) -> list[dict[str, Any]]:
    rows = []
    base, inputs = base_of(what)
    for rank in ranks:
        for wide in (True, False):
            for name, (side, variant, choice, each_step, compile_) in SIDES.items():
                if (label and side != "theirs") or (compile_ and not CUDA):
                    continue
                row = {"what": what, "rank": rank, "adapter": "float32" if wide else "bfloat16",
                       "form": name.replace("PEFT", label or "PEFT")}  # fmt: skip
                print(f"{what} r={rank} {row['adapter']} {row['form']}", file=sys.stderr, flush=True)
                try:
                    model = copy.deepcopy(base)
                    if side == "theirs":
                        made, optimizer = theirs(model, variant, rank, wide)
                    else:
                        made, optimizer = ours(model, variant, rank, choice, each_step, wide)
                    rows.append(row | measured(made, optimizer, inputs, compile_))
                except (ImportError, RuntimeError, UserError) as e:
                    rows.append(row | {"error_text": f"{type(e).__name__}: {str(e).splitlines()[0][:100]}"})
                finally:
                    kernels.choose("auto")
                    model = made = optimizer = None  # type: ignore[assignment]
                    gc.collect()
                    if CUDA:
                        torch.cuda.empty_cache()
    return rows


def measured(model: nn.Module, optimizer: Any, inputs: list[torch.Tensor], compiled: bool) -> dict[str, Any]:
    run: Any = torch.compile(model) if compiled else model

    @torch.no_grad()
    def forward(i: int) -> None:
        with torch.autocast(DEVICE, DTYPE):
            run(inputs[i % 3])

    def both(i: int) -> None:
        with torch.autocast(DEVICE, DTYPE):
            out = run(inputs[i % 3].detach().requires_grad_())
        out.float().square().mean().backward()

    def step(i: int) -> None:
        for k in range(MICRO_BATCHES):
            x = inputs[(i + k) % 3].detach().requires_grad_()
            with torch.autocast(DEVICE, DTYPE):
                out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
            out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    few = max(3, REPEATS // 5)
    return {"forward": seconds(forward, few), "forward and backward": seconds(both, few), "step": seconds(step, max(3, few // 3)),
            "peak_bytes": peak(both)}  # fmt: skip


# the table


def shown(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        if r["what"] == "device":
            lines.append(f"copy {r['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 products {r['flops'] / 1e12:.0f} TFLOP/s\n")
        elif "seconds" in r:
            s, error = r["seconds"], f", error {r['error']:.0e}" if "error" in r else ""
            mib = "" if r["peak_bytes"] is None else f", {r['peak_bytes'] / 2**20:.0f} MiB"
            ms = f"{s['median'] * 1e3:.3f} ms ({s['low'] * 1e3:.3f}-{s['high'] * 1e3:.3f})"
            lines.append(f"{r['what']:30} {r['shape']!s:22} {r['form']:18} {ms}, {r['limit']:.0%} of the limit{mib}{error}")
        elif "error_text" in r:
            lines.append(f"{r['what']} r={r['rank']} {r['adapter']:8} {r['form']:36} {r['error_text']}")
        else:
            mib = "" if r["peak_bytes"] is None else f", {r['peak_bytes'] / 2**20:.0f} MiB"
            ms = ", ".join(f"{k} {r[k]['median'] * 1e3:.2f} ms" for k in ("forward", "forward and backward", "step"))
            lines.append(f"{r['what']} r={r['rank']} {r['adapter']:8} {r['form']:36} {ms}{mib}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["micro", "layer", "stack"])
    parser.add_argument("--ranks", default="16,64,384,768" if CUDA else "4", help="comma-separated")
    parser.add_argument("--official", type=Path, help="a checkout of sockeye44/dorafactors: its rows alone")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    chosen = parser.parse_args(arguments)
    ranks = [int(r) for r in chosen.ranks.split(",")]
    label = ""
    if chosen.official:
        if not (found := list(chosen.official.glob("**/src/peft/__init__.py"))):
            raise UserError(f"{chosen.official} holds no src/peft")
        sys.path.insert(0, str(found[0].parents[1]))
        label = "official"
    rows = micro(ranks) if chosen.what == "micro" else stacked(chosen.what, ranks, label)
    about = environment(DEVICE)
    made = {"schema": 1, "command": said("gpu", arguments), "environment": about, "rows": rows}
    path = chosen.out / f"gpu_{chosen.what}{'_official' * bool(label)}.json"
    files.write_whole(path, (json.dumps(made, indent=1) + "\n").encode())
    print(f"\n{chosen.what} on {torch.cuda.get_device_name() if CUDA else 'a CPU, small: no result'}; wrote {path}\n")
    print(shown(rows))
    return 0


if __name__ == "__main__":
    call(main)
