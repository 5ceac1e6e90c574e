"""Does the contract notice? Break one line at a time in a copy and run a few composites. python tests/contract/mutants.py

Not collected by pytest. Prints one line a mutant and exits with 1 if one is missed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = "tests/contract/test_words.py"
OPTIONS = "tests/contract/test_options.py"
PROCESS = "tests/contract/test_new_process.py"
HUGGING = "tests/contract/test_transformers.py"
FAULTS = "tests/faults"
MUTANTS = [  # file, what stands there, what stands there instead, composites or test files
    ("variants/dora.py", "+ g * update", "+ update", "dora"),
    ("variants/dora.py", "+ 2 * (b", "+ (b", "dora+pissa"),
    ("variants/dora.py", " and not self.constant", "", "tests/variants/test_dora.py"),
    ("variants/dora.py", "(self.square > 0) & (square > 0)", "square > 0", "tests/variants/test_dora.py"),
    ("variants/bitfit.py", "if first else self.delta", "if False else self.delta", "tests/variants/test_bitfit.py"),
    (
        "variants/vera.py",
        'if torch.equal(checksum(a, b), saved["checksum"].cpu()):',
        "if True:",
        "tests/variants/test_vera.py",
    ),
    ("variants/vera.py", "generator=generator", "generator=None", "tests/variants/test_vera.py"),
    ("variants/lotr.py", 'if not silenced and "zero"', 'if False and "zero"', "tests/variants/test_lotr.py"),
    ("variants/lotr.py", "left.T @ w @ right.T", "right @ w.T @ left", "tests/variants/test_lotr.py"),
    ("variants/ia3.py", "(self.l - 1) * base.bias", "0 * base.bias", "tests/variants/test_ia3.py"),
    ("variants/ia3.py", "(?<!attention\\.)", "", "tests/variants/test_ia3.py"),
    ("variants/hydra_lora.py", "self.low_rank.drop(x)", "x", OPTIONS),
    (
        "variants/hydra_lora.py",
        ".transpose(0, 1).flatten(1)",
        ".flatten(0, 1).view(-1, self.experts * z.shape[-1])",
        "tests/variants/test_hydra_lora.py",
    ),
    ("variants/molora.py", "isinstance(first, Copy) or ", "", "full+molora"),
    ("adapter/part.py", "isinstance(inner, Copy) or ", "", "tests/variants/test_dora.py"),
    ("targets.py", "(ties or m not in shared)", "True", "tests/variants/test_full.py"),
    (
        "holder.py",
        "    for _, h in all_held:\n        h.delta.write(h.base)\n",
        "        h.delta.write(h.base)\n",
        "tests/variants/test_full.py",
    ),
    ("variants/full.py", "self.dense_bias - base.bias", "self.dense_bias", "full+dora"),
    ("variants/full.py", "to(dtype, copy=True).contiguous()", "to(dtype).contiguous()", "full"),
    ("variants/lora.py", "self.low_rank.randomize()", "pass", WORDS),
    ("variants/lora.py", '"input", ', "", WORDS),
    ("variants/pissa.py", "self.config.niter)", "2)", f"{OPTIONS} pissa"),
    ("variants/lora_plus.py", "self.config.ratio", "1.0", OPTIONS),
    ("variants/vera.py", 'self.__dict__["bank"] = bank', "self.bank = bank", "vera vera+dora"),
    ("variants/molora.py", "e.update(x, base, y)", "e.update(x, base, y).detach()", "molora"),
    ("adapter/low_rank.py", "self.scale if self.gate is None else self.scale * self.gate", "self.scale", "adalora"),
    ("adapter/low_rank.py", "F.dropout(x, self.dropout, self.training)", "F.dropout(x, self.dropout, True)", "lora"),
    ("adapter/low_rank.py", "linear(self.drop(x), a, b)", "linear(x, a, b)", f"lora {OPTIONS}"),
    ("adapter/low_rank.py", "anchored = b is not None and not self.silenced", "anchored = False", "pissa"),
    (
        "adapter/low_rank.py",
        "a, b, None, None\n        self.silenced",
        "a, b, self.A0, self.B0\n        self.silenced",
        "pissa+relora",
    ),
    ("adapter/low_rank.py", 'grown = (("A0", "B0"), ("A_past", "B_past"))', "grown = ()", f"pissa {WORDS}"),
    ("adapter/low_rank.py", "torch.promote_types(like.dtype, torch.float32) if like", "like.dtype if like", "lora"),
    (
        "adapter/elastic.py",
        "new = nn.Parameter(new, now is None or now.requires_grad)",
        "new = nn.Parameter(new, False)",
        f"lora {PROCESS}",
    ),
    ("adapter/elastic.py", "list(got) != want", "False", "lora"),
    ("adapter/delta.py", "change if change > 0 else 0.0", "change if change > 9e9 else 0.0", FAULTS),
    (
        "adapter/delta.py",
        "self.module._apply(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t)",
        "pass",
        "full head_only",
    ),
    (
        "adapter/delta.py",
        "copy.deepcopy(module, memo).requires_grad_(True)",
        "module.requires_grad_(True)",
        "head_only",
    ),
    ("adapter/delta.py", "base.module.load_state_dict(self.module.state_dict())", "pass", "lora"),
    ("adapter/site.py", "return w.T if is_transposed(self.module) else w", "return w", "lora"),
    ("adapter/site.py", "self.bias.copy_(bias)", "pass", "bitfit"),
    ("adapter/part.py", "stage.index == 0 and not self.adapter.loaded", "not self.adapter.loaded", "pissa"),
    ("adapter/part.py", "stage.index == 0 and not self.adapter.loaded", "stage.index == 0", "pissa"),
    ("adapter/adapter.py", "if n not in mine and n not in theirs]", "if False]", "lora"),
    ("adapter/adapter.py", "self.load_state_dict(state)\n", "self.load_state_dict(state, strict=False)\n", "none"),
    (
        "adapter/adapter.py",
        "        if bad:\n",
        "        if bad and not self.load_state_dict(state, strict=False):\n",
        "lora",
    ),
    ("adapter/adapter.py", 'not k.startswith("parts.") or', "", "dora"),
    ("adapter/adapter.py", "        self.loaded = True\n", "", "pissa"),
    ("attach.py", "        model.requires_grad_(False)\n", "", "lora"),
    ("attach.py", "p.requires_grad_(name in self._were_trained)", "p.requires_grad_(True)", "lora"),
    (
        "attach.py",
        "self.adapter = Adapter(config, found.sites, head_modules).train(model.training)",
        "self.adapter = Adapter(config, found.sites, head_modules)",
        "none",
    ),
    ("attach.py", "        self._convert(dtype)\n", "", "lora"),
    ("attach.py", "            holder.unmerge(m)\n", "            holder.switch(m, True)\n", "lora"),
    (
        "attach.py",
        "        if self.merged:\n            self.unmerge()\n        return self._released()",
        "        return self._released()",
        "lora",
    ),
    ("attach.py", "with torch.random.fork_rng():", "with contextlib.nullcontext():", "lora"),
    ("holder.py", "        setattr(module, name, None)  # a bias that merging added", "        pass", "bitfit full"),
    (
        "holder.py",
        "p.data = torch.empty_like(p.data, device=device).copy_(p.data)",
        "p.data = torch.empty_like(p.data, device=device)",
        "full",
    ),
    ("holder.py", '    del module.__dict__["_held"]', "    pass", "lora"),
    ("checkpoint.py", "adapted.adapter.load({**tensors, ", "adapted.adapter.load({", "lora"),
    ("checkpoint.py", 'fingerprint.of_model(model, about["heads"]) != about["base"]', "False", FAULTS),
    ("checkpoint.py", 'config.trained_modules = about["heads"]', "pass", "none"),
    ("optim.py", "options.setdefault(p, {}).update(kv)", "pass", f"{OPTIONS}"),
    ("optim.py", "        self.index += 1\n", "        self.index = 0\n", "relora adalora"),
    ("optim.py", "self.adapter.after_step(self.step())", "pass", f"{OPTIONS} adalora relora"),
    ("optim.py", 'g["lr"] = g["lr"] * rate', "pass", OPTIONS),
    ("optim.py", "del opt.state[p]", "pass", "relora"),
    ("probe.py", "            m.training = mode", "            m.training = True", "eva"),
    ("targets.py", "shared[o]", "shared[o]", "none"),
    ("targets.py", "if m is not output", "", "none"),
    (
        "registry.py",
        '            if axis in taken:\n                raise UserError(f"{taken[axis].name!r} and {c.name!r} both decide',
        '            if False:\n                raise UserError(f"{taken[axis].name!r} and {c.name!r} both decide',
        WORDS,
    ),
    ("registry.py", "self.target_modules = list(wanted)", "pass", "lora"),
]


def main(only: list[str]) -> int:
    missed = 0
    for file, old, new, where in MUTANTS:
        source = ROOT / "lorafactory" / file
        if where == "none" or not source.exists() or (only and not any(o in file for o in only)):
            continue
        text = source.read_text()
        if old not in text:
            print("STALE   ", file, "|", " ".join(old.split())[:70], flush=True)
            missed += 1
            continue
        noticed, said = run(file, text.replace(old, new), where.split())
        missed += not noticed
        print("noticed " if noticed else "MISSED  ", file, "|", " ".join(new.split())[:60], "|", said, flush=True)
    return int(missed > 0)


def run(file: str, text: str, where: list[str]) -> tuple[bool, str]:
    """Whether a copy with the broken file fails, and the last line that pytest printed about it."""
    with tempfile.TemporaryDirectory() as room:
        for part in ("lorafactory", "tests", "configs", "pyproject.toml"):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, Path(room, part), ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / part).exists():
                shutil.copy(ROOT / part, room)
        Path(room, "lorafactory", file).write_text(text)
        nodes = [w if "/" in w else f"tests/contract/test_life.py::test_life[{w}]" for w in where]
        nodes = [n for n in nodes if "::" in n or Path(room, n).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", *nodes]
        environment = {**os.environ, "PYTHONPATH": room, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))]
    return done.returncode == 1, (lines or done.stdout.splitlines()[-1:] or [done.stderr[-200:]])[0][:140]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
