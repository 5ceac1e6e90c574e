"""Do the tests notice? Break one line at a time in a copy and run a few of them. python tests/contract/mutants.py [FILE ...]

Not collected by pytest. Prints one line a mutant, and exits with 1 if one is missed or no longer fits the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# where: composites, whose life is run; or a file of tests/contract, tests/faults or, with an @, tests/variants, and after
# a slash which of its tests
FILES = {n: f"tests/contract/test_{n}.py" for n in ("attach", "lifecycle", "words", "options", "new_process", "transformers")}
FILES |= {"truncations": "tests/train/test_truncations.py"}
FILES |= {n: f"tests/faults/test_{n}.py" for n in ("merge", "target", "wiring", "init", "resume", "math")}
# fmt: off
MUTANTS = [  # file, what stands there, what stands there instead, where
    ("adapter/adapter.py", "if n not in mine and n not in theirs]", "if False]", "lora"),
    ("adapter/adapter.py", "        if bad:\n",
     "        if bad and not self.load_state_dict(state, strict=False):\n", "lora"),
    ("adapter/adapter.py", 'not k.startswith("parts.") or', "", "dora"),
    ("adapter/adapter.py", "        kernels.changed()\n        self.started = True\n",
     "        kernels.changed()\n", "pissa"),
    ("adapter/adapter.py", '        self._each("begin", stage)\n        self.started = True\n',
     '        self._each("begin", stage)\n', "init/runs_once"),
    ("adapter/adapter.py", "with exact():", "if True:", "math/autocast"),
    ("adapter/adapter.py", "                own.update(before)\n", "                pass\n", "truncations"),
    ("adapter/continual.py", "                low.fold()\n", "                low.fresh()\n", "@o_lora"),
    ("attach.py", "self.seed + index", "self.seed", "@o_lora"),
    ("adapter/delta.py", "lost(b, ", "0 * lost(b, ", "merge/B03"),
    ("adapter/delta.py", "return max(bias, lost(w, base.weight))", "return bias", "merge/B03"),
    ("adapter/delta.py", "self.module._apply(", "(lambda f: None)(", "full head_only"),
    ("adapter/delta.py", "lambda t: _cast(t, own, theirs)", "lambda t: t", "math/dtypes"),
    ("adapter/delta.py", "copy.deepcopy(module, memo).requires_grad_(True)",
     "module.requires_grad_(True)", "head_only"),
    ("adapter/delta.py", "base.module.load_state_dict(self.module.state_dict())", "pass", "lora"),
    ("adapter/delta.py", "            setattr(base.module, name, None)  # a bias that write() added", "            pass", "merge/B04"),
    ("adapter/elastic.py", "new = nn.Parameter(new, now is None or now.requires_grad)",
     "new = nn.Parameter(new, False)", "lora new_process"),
    ("adapter/elastic.py", "list(got) != want", "False", "lora"),
    ("adapter/elastic.py", "needed = any(n in saved for n in group[name]) if together else", "needed =", "pissa words"),
    ("adapter/framed.py", ".unflatten(-1, (k, m)).sum(-2)", "[..., :m]", "@e8_lora"),
    ("adapter/framed.py", "x[..., whole:m].to(y.dtype)", "0 * x[..., whole:m].to(y.dtype)", "@leech_lora"),
    ("adapter/low_rank.py", "self.scale if self.gate is None else self.scale * self.gate", "self.scale", "adalora"),
    ("adapter/delta.py", "F.dropout(x, module.dropout, module.training)", "F.dropout(x, module.dropout, True)", "lora"),
    ("adapter/low_rank.py", "return through(self.drop(x), a, b)", "return through(x, a, b)", "lora"),
    ("adapter/low_rank.py", "anchored = b is not None and not self.silenced", "anchored = False", "pissa"),
    ("adapter/low_rank.py", "a, b, None, None\n        self.silenced",
     "a, b, self.A0, self.B0\n        self.silenced", "pissa+relora"),
    ("adapter/low_rank.py", "            self._allocate(rank)\n        self.fresh()\n\n    @torch.no_grad()\n    def resize",
     "            pass\n        self.fresh()\n\n    @torch.no_grad()\n    def resize", "@codyra"),
    ("adapter/low_rank.py", "torch.cat([self.A0, new.A.detach()])", "torch.cat([self.A0, torch.zeros_like(new.A)])[: len(self.A0)]", "@alora"),
    ("adapter/adapter.py", "        self._tie(state)\n", "", "@diffora"),
    ("adapter/low_rank.py", "torch.promote_types(like.dtype, torch.float32) if like", "like.dtype if like", "lora"),
    ("adapter/low_rank.py", "self.mask is not None and (self.training or self.mask_always)", "self.mask is not None", "@dylora"),
    ("adapter/low_rank.py", "self.training or self.mask_always", "self.training", "@airllm"),
    ("adapter/low_rank.py", "self.A0 = self.B0 = self.A_past = self.B_past = None", "self.A0 = self.B0 = None", "@lora_squeeze"),
    ("adapter/nested.py", "        self.register_load_state_dict_post_hook(_masked)\n", "", "dylora"),
    ("adapter/nested.py", "low.scale.mul_(self.share(low, rank))", "pass", "@matryoshka_lora"),
    ("adapter/nested.py", "        self.turn(0)\n", "", "matryoshka_lora"),
    ("adapter/low_rank.py", 'self.register_buffer("scale", torch.tensor(scale, dtype=dtype, device=like.device))',
     "self.scale = torch.tensor(scale)", "lora init/B19"),
    ("adapter/low_rank.py", "t.mul_(1 - share)", "t.mul_(1 + share)", "@periodic_lora"),
    ("adapter/part.py", "stage.index == 0 and not self.adapter.started", "stage.index == 0", "pissa"),
    ("adapter/part.py", "isinstance(inner, Copy) or ", "", "@dora"),
    ("adapter/sparse.py", "full[rows, columns], None", "full[columns % len(full), rows % full.shape[1]], None", "shira"),
    ("adapter/sparse.py", 'return {"rows": rows.clone(), "columns": columns.clone(), ', "return {", "@shira"),
    ("adapter/singular.py", ".abs().max() < TOLERANCE", ".abs().max() < 1e9", "@svf"),
    ("adapter/singular.py", "u * sign, s, vt * sign[:, None]", "u, s, vt", "@svf"),
    ("adapter/site.py", "return w.T if is_transposed(self.module) else w", "return w", "lora"),
    ("adapter/site.py", "self.bias.copy_(bias)", "pass", "bitfit"),
    ("adapter/site.py", "self.module.bias = nn.Parameter(bias.to(self.weight.dtype), requires_grad=False)",
     "pass", "merge/B04"),
    ("adapter/spectral.py", "index // self.d_in, index % self.d_in", "index % self.d_out, index // self.d_out", "@fourierft"),
    ("adapter/spectral.py", ".unique()) < len(saved", ") < len(saved", "@fourierft"),
    ("mount.py", "        model.requires_grad_(False)\n", "", "lora"),
    ("mount.py", "p.requires_grad_(name in self._trained)", "p.requires_grad_(True)", "lora"),
    ("mount.py", "m.training = mode", "pass", "attach/leaves_no"),
    ("mount.py", "        self._convert(dtype)\n", "", "lora"),
    ("mount.py", "*self.model.named_buffers()", "", "merge/B03"),
    ("mount.py", "            holder.unmerge(m)\n", "            holder.switch(m, True)\n", "lora"),
    ("attach.py", "        if self.merged:\n            self.unmerge()\n", "", "lora"),
    ("attach.py", "with torch.random.fork_rng():", "with contextlib.nullcontext():", "lora"),
    ("attach.py", '{**self.__dict__, "_stage": None}', "self.__dict__", "lora"),
    ("mount.py", "            raise\n        holder.allow(self._shortcuts, False)\n", "            raise\n", "math/encoder"),
    ("attach.py", "        self._attached(\"merge\")\n", "", "lora"),
    ("attach.py", " and not self.adapter.started:\n            raise", ":\n            raise", "attach/again"),
    ("attach.py", "_index=index, _stage", "_index=0, _stage", "attach/draws"),
    ("attach.py", "with self._drawing(self._index):", "if True:", "attach/draws"),
    ("attach.py", "heads).train(model.training)", "heads)", "attach/takes"),
    ("attach.py", "config.target_modules, list(heads),", "config.target_modules, [],", "attach/head"),
    ("attach.py", "if not self.mount.on and not within:", "if False:", "attach/misuse"),
    ("attach.py", "self.mount.switch(was)", "self.mount.switch(True)", "attach/misuse"),
    ("attach.py", "if not self.adapter.mergeable:", "if False:", "gated_lora"),
    ("attach.py", "        adapted.detach()\n        raise\n", "        raise\n", "attach/start_from"),
    ("attach.py", 'self.adapter.__dict__["penalty_taken"] = True', "pass", "transformers/forgets"),
    ("attach.py", "self.num_trainable() - head,", "self.num_trainable(),", "attach/head"),
    ("attach.py", "            self.model.eval()  # a base", "            pass  # a base", "attach/leaves_no"),
    ("attach.py", "        if not self.merged:\n            self.merge()\n", "", "lora"),
    ("attach.py", "if any(isinstance(m, holder.Holder) for m in model.modules()):", "if False:", "attach/misuse"),
    ("attach.py", "if not isinstance(variant, str) and options:", "if False:", "attach/misuse"),
    ("attach.py", "list(batches or ())[:n]", "list(batches or ())", "attach/batches"),
    ("attach.py", 'batch.get("attention_mask") if hasattr(batch, "get") else None', "None", "attach/batches"),
    ("attach.py", "head, self._stage).optimizer", "head, None).optimizer", "@alora"),
    ("targets.py", 'if not inside(n.rpartition(".")[0], found)}', "}", "target/B11"),
    ("checkpoint.py", "adapted.adapter.load({**tensors, ", "adapted.adapter.load({", "lora"),
    ("checkpoint.py", 'fingerprint.of_model(model, about["heads"]) != about["base"]', "False", "merge/B06"),
    ("attach.py", "of_model(self.model, list(self.adapter.copies()))", "of_model(self.model)", "target/B11"),
    ("checkpoint.py", "seed=0)", "seed=None)", "lora"),
    ("checkpoint.py", 'if about["schema"] != SCHEMA', "if False", "resume/B28"),
    ("checkpoint.py", "            os.rename(old, folder)\n", "            pass\n", "resume/B28"),
    ("checkpoint.py", "if t.numel() and where in first", "if False", "@full"),
    ("detour.py", "with exact():", "if True:", "math/autocast"),
    ("evaluate.py", "math.log2(r) for r in ranks", "float(r) for r in ranks", "truncations"),
    ("holder.py", "p.data = torch.empty_like(p.data, device=device).copy_(p.data)",
     "p.data = torch.empty_like(p.data, device=device)", "full"),
    ("holder.py", '    del module.__dict__["_held"]', "    pass", "lora"),
    ("holder.py", "    for _, h in all_held:\n        h.delta.write(h.base)\n",
     "        h.delta.write(h.base)\n", "@full"),
    ("optim.py", "options.setdefault(p, {}).update(kv)", "pass", "options/lora_plus"),
    ("optim.py", "        self.index += 1\n", "        self.index = 0\n", "relora adalora"),
    ("optim.py", "self.adapter.after_step(self.step())", "pass", "relora"),
    ("optim.py", "self.adapter.before_step(self.step())", "pass", "@adalora"),
    ("optim.py", 'g["lr"] = g["lr"] * rate', "pass", "options/relora"),
    ("optim.py", "            self.depth = 0  # this step", "            pass  # this step", "wiring/B15"),
    ("optim.py", "del opt.state[p]", "pass", "lifecycle"),
    ("optim.py", "change(t) if torch.is_tensor(t) and t.dim()", "torch.zeros_like(new) if torch.is_tensor(t) and t.dim()", "@sora"),
    ("policy.py", "gamma * decay * goes_on * gain", "gamma * goes_on * gain", "@airllm/advantages"),
    ("policy.py", "(1 - kept_next).sqrt() * noise", "(1 - kept_next) * noise", "@airllm/ddim"),
    ("probe.py", "            y = y + torch.nn.functional", "            y = 1.0 * y  # + torch.nn.functional", "@colora"),
    ("optim.py", "            g[\"lr\"] = lr\n", "            pass\n", "lifecycle"),
    ("optim.py", "if self.depth > 1:", "if False:", "lifecycle"),
    ("probe.py", "            m.training = mode", "            m.training = True", "eva"),
    ("registry.py",
     '            if axis in taken:\n                raise UserError(f"{taken[axis].name!r} and {c.name!r} both decide',
     '            if False:\n                raise UserError(f"{taken[axis].name!r} and {c.name!r} both decide',
     "words"),
    ("registry.py", "self.target_modules = list(wanted)", "pass", "lora"),
    ("registry.py", "not math.isfinite(value)", "False", "options/nonsense"),
    ("registry.py", "if isinstance(options, cls)", 'if hasattr(options, "name")', "words"),
    ("targets.py", "(ties or m not in shared)", "True", "@full"),
    ("targets.py", "                _refuse_unfit(entry, modules, able)\n", "                pass\n", "merge/B04"),
    ("targets.py", "if tail and seen < count", "if False", "target/B08"),
    ("targets.py", 'name.endswith("." + entry)', "name.endswith(entry)", "target/B08"),
    ("variants/allora.py", ".clamp_min(0).sqrt()", ".clamp_min(0)", "@allora"),
    ("adapter/low_rank.py", "still_b + c * (b - still_b)", "b", "@allora"),
    ("variants/bitfit.py", "if first else self.delta", "if False else self.delta", "@bitfit"),
    ("gates.py", "gate.abs() - threshold", "gate.abs() - 2 * threshold", "@sora @codyra"),
    ("gates.py", "low.keep(low.gate.detach().nonzero().flatten())", "low.keep(torch.arange(int(low.gate.count_nonzero())))", "@sora"),
    ("bilevel.py", "batches[held:], batches[:held]", "batches, batches[:held]", "@autolora"),
    ("bilevel.py", "d - self.lr * a for", "d + self.lr * a for", "@autolora"),
    ("bilevel.py", "adapter.load_state_dict(kept)", "pass", "@autolora"),
    ("variants/alora.py", "g[k] = 1.0 if one else 0.0", "g[k] = 1.0", "@alora"),
    ("variants/alora.py", "key=lambda i: -float(", "key=lambda i: float(", "@alora"),
    ("variants/alora.py", "for fewest in sorted(set(lost)):", "for fewest in sorted(set(lost), reverse=True):", "@alora"),
    ("variants/autolora.py", "low.scale.mul_(low.rank / rank)", "pass", "@autolora"),
    ("variants/codyra.py", "if stage.index <= int(self.stage):", "if not stage.index:", "@codyra"),
    ("variants/codyra.py", "- (math.ceil(dense) - 1) // every", "- math.ceil(dense) // every", "@codyra"),
    ("variants/diffora.py", "(-float(gamma[i]), i)", "(float(gamma[i]), i)", "@diffora"),
    ("variants/diffora.py", "low.A, low.B = leader.A, leader.B", "pass", "@diffora"),
    ("variants/gelora.py", "max(round(after) - round(before), 0) + 1", "max(round(after) - round(before), 0)", "@gelora"),
    ("variants/gelora.py", "k = int(0.9 * n)", "k = n - 1", "@gelora"),
    ("variants/increlora.py", "(now - i).abs()", "now", "@increlora"),
    ("variants/increlora.py", "gradients[site.key] = step.sum(", "gradients[site.key] = (", "@increlora"),
    ("variants/increlora.py", "low.gate[k:] = RESERVE  # the reserve", "pass  # the reserve", "@increlora"),
    ("variants/sora.py", "self.lambdas[level] * rates.get(low.gate, 1.0)", "self.lambdas[level]", "@sora"),
    ("variants/airllm.py", "p.grad = None", "pass", "@airllm/too_much"),
    ("variants/airllm.py", "        self.register_load_state_dict_post_hook(_masked)\n", "", "@airllm/checkpoint"),
    ("variants/block_lora.py", "x.unflatten(-1, (self.arms, -1)).sum(-2)",
     "x.unflatten(-1, (-1, self.arms)).sum(-1)", "@block_lora"),
    ("variants/boft.py", "flatten().argsort()", "flatten()", "@boft"),
    ("variants/boft.py", "if back else reversed(steps)", "if not back else reversed(steps)", "@boft"),
    ("variants/boft.py", "b - self.s * b", "0 * b", "@boft"),
    ("variants/c3a.py", "(k - k[:, None])", "(k[:, None] - k)", "@c3a"),
    ("variants/c3a.py", ".conj()", "", "@c3a"),
    ("variants/bora.py", ", (self.rows / rho).square()", "", "@bora"),
    ("variants/colora.py", "{n: k / points * d", "{n: 0 * d", "@colora"),
    ("variants/colora.py", "a * c[n] * p * q / (p + q)", "a * c[n] * p * q", "@colora"),
    ("variants/bora.py", "(self.rows / rho)[:, None] * v", "v", "@bora"),
    ("variants/bora.py", "r * (more + update)", "r * update", "@bora"),
    ("variants/cg_lora.py", "if self.fixed is not None:", "if False:", "@cg_lora"),
    ("variants/delora.py", "[b, -self.B0]", "[b, self.B0]", "@delora"),
    ("variants/delora.py", "b, a * self.w", "b, a", "@delora"),
    ("variants/delta_lora.py", "p.grad.div_(1 + self.config.ratio)", "pass", "@delta_lora"),
    ("variants/delta_lora.py", "if not self.moving and step.index", "if step.index", "@delta_lora"),
    ("variants/denselora.py", "k.scale * self.drop(", "k.scale * (", "@denselora"),
    ("variants/dora.py", "+ g * update", "+ update", "dora"),
    ("adapter/wrapper.py", "if not self.constant:", "if True:", "@dora"),
    ("kernels/norms.py", "b[rows], a, out=", "b[rows], a, alpha=0.9, out=", "@dora"),
    ("kernels/norms.py", "(2 * products(", "(products(", "@dora"),
    ("kernels/eager.py", "torch.addcmul(bias - g * bias, g, inner)", "torch.addcmul(bias, g, inner)", "dora"),
    ("variants/dora.py", ", self.square > 0)", ")", "@dora"),
    ("variants/dylora.py", "p.index_copy_(dim, index, values)", "pass", "@dylora/frozen"),
    ("variants/dylora.py", "torch.randint(len(able), ())", "len(able) - 1", "@dylora"),
    ("variants/fact.py", ".permute(2, 0, 3, 1)", ".permute(2, 1, 3, 0)", "@fact"),
    ("variants/fact.py", 'len(state[f"{n}.P"]) == rank', "True", "@fact"),
    ("variants/flora_opt.py", "state[\"moment\"] = down(whole, p)", "pass", "@flora_opt"),
    ("variants/flora_opt.py", "/ rank**0.5", "/ rank", "@flora_opt"),
    ("variants/fourierft.py", 'fft(z, norm="forward")', "fft(z)", "@fourierft"),
    ("variants/fourierft.py", "torch.fft.fftfreq(d, 1 / d)", "torch.arange(d) - d / 2", "@fourierft"),
    ("variants/fourierft.py", "log_p.flatten() - times.log()", "log_p.flatten() + times.log()", "@fourierft"),
    ("variants/full.py", "self.dense_bias - base.bias", "self.dense_bias", "full+dora"),
    ("variants/full.py", "to(dtype, copy=True).contiguous()", "to(dtype).contiguous()", "full+dora"),
    ("eight_bits.py", ".to(torch.uint8)", "", "@galore"),
    ("variants/galore.py", " and n not in bases[p]", "", "@galore"),
    ("variants/gated_lora.py", "torch.sigmoid(linear(x, *self.gate))", "torch.sigmoid(linear(x, self.gate[0]))", "@gated_lora"),
    ("variants/hra.py", "(u.mT @ u).triu(1)", "(u.mT @ u).tril(-1).mT.triu(2)", "@hra"),
    ("variants/hra.py", "pairs.insert(0, (k.mT, v.mT))", "pairs.append((k.mT, v.mT))", "@hra"),
    ("variants/hydra.py", "self.sequential.low(y)", "self.sequential.low(y + u)", "@hydra"),
    ("variants/hydra_lora.py", "self.low_rank.drop(x)", "x", "options/hydra_lora"),
    ("variants/hydra_lora.py", ".transpose(0, 1).flatten(1)",
     ".flatten(0, 1).view(-1, self.experts * z.shape[-1])", "@hydra_lora"),
    ("variants/ia3.py", "(self.l - 1) * base.bias", "0 * base.bias", "@ia3"),
    ("variants/ia3.py", "(?<!attention\\.)", "", "@ia3"),
    ("variants/lola.py", "new / float(self.strength)", "new", "@lola"),
    ("detour.py", "                p.grad = own\n", "                pass\n", "@riemannian"),
    ("variants/lora_fa.py", "low.A.requires_grad_(False)", "pass", "@lora_fa"),
    ("variants/lora_fa.py", " / s**2", "", "@lora_fa"),
    ("variants/lora_rite.py", "return m @ self.inverse.mT", "return m @ self.inverse", "@lora_rite"),
    ("variants/lora_rite.py", "first * self.old[\"m\"] @ turn.mT", "first * self.old[\"m\"]", "@lora_rite"),
    ("variants/riemannian.py", "(b.mT @ b, a @ a.mT)", "(a @ a.mT, b.mT @ b)", "@riemannian"),
    ("variants/lora.py", "self.low_rank.randomize()", "pass", "words"),
    ("variants/lora.py", '"input", ', "", "words"),
    ("variants/lora_plus.py", "self.config.ratio", "1.0", "options/lora_plus"),
    ("variants/lora_rite.py", "(rms(m) / cap).clamp_min(1)", "(rms(m) / cap)", "@lora_rite"),
    ("variants/lora_squeeze.py", "            step.rebuild_optimizer()", "            pass", "lora_squeeze"),
    ("variants/lora_squeeze.py", "u * torch.where(live, s / split, 0.0) / low.scale", "u * torch.where(live, s / split, 0.0)",
     "@lora_squeeze"),
    ("variants/loretta.py", "[*others, first]", "[first, *others]", "@loretta"),
    ("variants/loretta.py", "self.act(linear(self.drop(y), ", "self.act(linear(y, ", "@loretta"),
    ("variants/loretta.py", "!= rank * self.d_in", "< 0", "@loretta"),
    ("variants/loretta.py", "a * self.d_out != b * self.d_in", "False", "@loretta"),
    ("variants/lotr.py", 'if not silenced and "zero"', 'if False and "zero"', "@lotr"),
    ("variants/lotr.py", "left.T @ w @ right.T", "right @ w.T @ left", "@lotr"),
    ("variants/map.py", "inner.randomize()", "pass", "map"),
    ("variants/map.py", "(b.T @ b) * (a @ a.T)", "(b.T @ b) @ (a @ a.T)", "@map"),
    ("variants/matryoshka_lora.py", "2**i < most", "True", "@matryoshka_lora"),
    ("variants/melora.py", "first.A_past is not None", "False", "@melora"),
    ("variants/miss.py", "-self.d_in % len(self.D)", "0", "@miss"),
    ("variants/miss.py", "w + w @ self.D[:, None]", "w + self.D[:, None] @ w", "@miss"),
    ("variants/miss.py", "nn.init.normal_(self.D)", "pass", "words"),
    ("variants/molora.py", "e.update(x, base, y)", "e.update(x, base, y).detach()", "molora"),
    ("variants/molora.py", "isinstance(first, Copy) or ", "", "@molora"),
    ("variants/moslora.py", "not config.frozen", "True", "@moslora"),
    ("variants/moslora.py", "torch.minimum(mask[:, None], mask)", "mask[:, None] * mask", "@moslora"),
    ("variants/moslora.py", "None if self.A0 is None else self.M.detach().clone()", "None", "@moslora"),
    ("linalg.py", "eye - s, eye + s", "eye + s, eye - s", "@oft"),
    ("variants/oft.py", "r.mT if back else r", "r", "oft"),
    ("variants/oft.py", "2**0.5 * self.q.norm", "self.q.norm", "@oft"),
    ("variants/periodic_lora.py", "state.pop(p, None)", "pass", "@periodic_lora"),
    ("variants/pissa.py", "self.config.niter", "0", "options/pissa"),
    ("variants/randlora.py", "if self.tall else (a.T, b.T)", "if True else (a.T, b.T)", "randlora"),
    ("variants/randlora.py", "a.unflatten(0, (r, -1))", "a.unflatten(0, (-1, r)).transpose(0, 1)", "@randlora"),
    ("variants/randlora.py", "-(-self.small // rank) * rank", "self.small", "@randlora"),
    ("variants/salt.py", "torch.relu(s + self.X @ self.Y) - s", "self.X @ self.Y", "@salt"),
    ("variants/salt.py", "+ self.clipped() * z2", "", "@salt"),
    ("variants/sara.py", "self.index[:, ~out].contiguous()", "self.index[:, out].contiguous()", "@sara"),
    ("variants/sara.py", "step.rebuild_optimizer()", "pass", "@sara"),
    ("variants/vida.py", "self.lam[0] * u1, self.lam[1] * u2", "u1, u2", "@vida"),
    ("variants/share.py", "(self.alpha @ self.past_a[t]).T", "(self.alpha @ self.a).T", "@share"),
    ("variants/share.py", "variance * held[-1]", "variance", "@share/variance"),
    ("train.py", " if row not in known]", "]", "@vida/move"),
    ("course.py", "self.past.rows[s][:1] if k else []", "[]", "truncations/every"),
    ("variants/shira.py", "scores * site.base.weight.abs()", "scores", "@shira"),
    ("variants/shira.py", "[n * offset :]", "[:n]", "@shira"),
    ("variants/vb_lora.py", "logits.topk(self.k, dim=-1)", "logits.topk(self.k, dim=-1, largest=False)", "@vb_lora"),
    ("variants/vb_lora.py", ".transpose(1, 2).flatten(0, 1), self", ".transpose(1, 2).reshape(-1, 3), self", "@vb_lora"),
    ("variants/vb_lora.py", "1 - w.sum(-1, keepdim=True)", "1 + w.sum(-1, keepdim=True)", "@vb_lora"),
    ("variants/lora_xs.py", "sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()",
     "sign = torch.ones_like(u[:1])", "@lora_xs"),
    ("variants/lora_xs.py", "u[:, -rank:], s[-rank:], vt[-rank:]", "u[:, :rank], s[:rank], vt[:rank]", "@lora_xs"),
    ("variants/lora_xs.py", "if stage.index == 0 and not self.adapter.started", "if stage.index == 0", "lora_xs @lora_xs"),
    ("variants/monteclora.py", "cloud.low.__dict__[\"noise\"] = cloud", "pass", "@monteclora"),
    ("variants/monteclora.py", "sign = 1 if official else -1", "sign = 1", "@monteclora"),
    ("variants/monteclora.py", "self.tau.detach().index_select(0, index)", "self.tau.detach()[: len(index)]", "@monteclora"),
    ("variants/mos.py", "(public + c.private * names.index(site.name)) * c.shards", "public * c.shards", "@mos"),
    ("variants/mos.py", "drawn(True) if c.dissociate", "drawn(True) if True", "@mos"),
    ("variants/mos.py", "c.alpha / rank", "c.alpha / c.lora_rank", "@mos"),
    ("variants/mos.py", "index.max() >= rows", "False", "@mos"),
    ("variants/owlora.py", "        rows.sub_(memory.inside(rows))", "        pass", "@owlora"),
    ("variants/inflora.py", "(before < share)", "(held < share)", "@inflora"),
    ("variants/inflora.py", " / math.sqrt(3)", "", "@inflora/leading"),
    ("variants/inflora.py", "torch.linalg.svd(h - memory.rows.T @ (memory.rows @ h))", "torch.linalg.svd(h)", "@inflora/left"),
    ("variants/inflora.py", "(rows - memory.inside(rows))", "rows", "@inflora/however"),
    ("variants/inflora.py", " * (s[: low.rank] > 1e-6 * s[0])[:, None]", "", "@inflora/zero"),
    ("variants/inflora.py", "            low.A.requires_grad_(False)\n", "            pass\n", "@inflora/leading"),
    ("variants/inflora.py", " + self.config.growth * max(0, int(self.stage))", "", "@inflora/energy"),
    ("variants/inflora.py", "max(1, int((held < share).sum()))", "int((held < share).sum())", "@inflora/many"),
    ("variants/inflora.py", "energy = s.square()", "energy = s", "@inflora/many"),
    ("variants/inflora.py", "if last[0] is not x:", "if last[0] is None:", "@inflora/leading"),
    ("variants/o_lora.py", "memory.rows @ low.A.T", "low.A @ low.A.T", "@o_lora"),
    ("variants/o_lora.py", '== "absolute" else', '!= "absolute" else', "@o_lora/hand"),
    ("variants/o_lora.py", "for p in (low.A, low.B))", "for p in (low.A,))", "@o_lora/hand"),
    ("variants/o_lora.py", ".clamp_min(1e-24)", "", "@o_lora/slope"),
    ("variants/o_lora.py", "total + c.orthogonality *", "total +", "@o_lora/hand"),
    ("variants/o_lora.py", "total + c.norm *", "total +", "@o_lora/hand"),
    ("variants/o_lora.py", "memory.add(used(low))", "memory.add(low.B.T)", "@o_lora/starts"),
    ("adapter/continual.py", "if stage.index <= int(self.stage):", "if stage.index < int(self.stage):", "@o_lora/resume"),
    ("adapter/continual.py", "                self.remember(low, memory)\n                low.fold()\n",
     "                low.fold()\n                self.remember(low, memory)\n", "@o_lora/starts"),
    ("adapter/continual.py", "[: self.d_in - len(self.rows)]", "", "@owlora/more"),
    ("adapter/continual.py", "if apart > 1e-3 else []", "if False else []", "@inflora/damaged"),
    ("variants/queryable_lora.py", "leader is not self and ", "", "@queryable_lora"),
    ("variants/queryable_lora.py", "if b < self.block and s.shape", "if s.shape",
     "transformers/queryable_lora"),
    ("variants/tied_lora.py", "b * self.v[:, None], self.pair.A", "b, self.pair.A", "@tied_lora"),
    ("variants/tied_lora.py", 'for name in ("B", "v", "u", "A")', 'for name in ("A", "B", "v", "u")', "@tied_lora"),
    ("variants/waveft.py", "rows % a + a * right", "rows % a + a * lower", "@waveft"),
    ("variants/waveft.py", "torch.where(z.abs() < 1, z, 1 / z)", "torch.where(z.abs() < 1, 1 / z, z)", "@waveft"),
    ("variants/waveft.py", "low if late == (order not in EARLY) else low.flip(0)", "low", "@waveft"),
    ("variants/waveft.py", "[z, z.conj()] if z.imag > 0 else [z]", "[z, z.conj()]", "@waveft"),
    ("variants/svf.py", "self.S.sum() / new.sum()", "1.0", "@svf"),
    ("variants/svf.py", "[z + weight * d.gain", "[weight * d.gain", "@svf"),
    ("variants/svf.py", "            self.adapter.load(before)\n", "", "@svf"),
    ("variants/svft.py", "self.mark.copy_(mark(self.U, self.Vt))", "pass", "@svft"),
    ("variants/svft.py", "self.Vt[k:] = u[:, k:], v.T[k:]", "self.Vt[k:] = u[:, k:], self.Vt[k:]", "@svft"),
    ("variants/svft.py", "self.U.T @ self.Vt.T", "self.U @ self.Vt", "@svft"),
    ("variants/svft.py", "(self.index[0], self.index[1]), self", "(self.index[1], self.index[0]), self", "@svft"),
    ("variants/tenslora.py", "for row in reversed(rows)", "for row in rows", "@tenslora"),
    ("variants/tenslora.py", "out.transpose(0, 1) if self.head_major", "out.transpose(0, 1) if not self.head_major", "@tenslora"),
    ("variants/molora.py", 'minds = frozenset({"shares every number"})', "minds = frozenset()", "@tenslora"),
    ("variants/rasa.py", "0.5 * c.alpha", "c.alpha", "@rasa"),
    ("variants/rasa.py", 'self.__dict__["pool"] = pool', "self.pool = pool", "rasa"),
    ("variants/nola.py", "made + bases_a[0] if self.offset", "made + bases_a[1] if self.offset", "@nola"),
    ("variants/nola.py", "+ 1 + site.index", "+ 1", "@nola"),
    ("variants/nola.py", "return checkpoint(self.combined, self.a, self.c, use_reentrant=False, preserve_rng_state=False)",
     "return self.combined(self.a, self.c)", "@nola"),
    ("variants/tera.py", "before *= f.shape[0]", "before *= f.shape[1]", "@tera"),
    ("variants/tera.py", "if torch.equal(self.checksum.cpu(), saved)", "if True", "@tera"),
    ("variants/vera.py", 'self.__dict__["bank"] = bank', "self.bank = bank", "vera vera+dora"),
    ("adapter/bank.py", 'if torch.equal(checksum(rank, a, b.mT), saved["checksum"].cpu()):', "if True:", "@vera"),
    ("adapter/bank.py", "generator=generator", "generator=None", "@vera"),
]
# fmt: on


def main(only: list[str]) -> int:
    bad = 0
    for file, old, new, where in MUTANTS:
        if only and not any(o in file for o in only):
            continue
        text = (ROOT / "lorafactory" / file).read_text()
        if old not in text:
            verdict, said = "STALE", ""
        elif trouble := sound(where):
            verdict, said = "UNSOUND", trouble
        else:
            passed, said = run({file: text.replace(old, new)}, where)
            verdict = "MISSED" if passed else "noticed"
        bad += verdict != "noticed"
        print(f"{verdict:8} {file} | {' '.join(old.split())[:50]} -> {' '.join(new.split())[:40]} | {said}", flush=True)
    return int(bad > 0)


@cache
def sound(where: str) -> str:
    """What is wrong with these tests even without a mutant: then they tell nothing."""
    passed, said = run({}, where)
    return "" if passed else said


def run(broken: dict[str, str], where: str) -> tuple[bool, str]:
    """Whether the tests pass on a copy with the broken files, and the first line that says why not."""
    with tempfile.TemporaryDirectory() as room:
        for part in ("lorafactory", "tests", "configs"):
            shutil.copytree(ROOT / part, Path(room, part), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", room)
        for file, text in broken.items():
            Path(room, "lorafactory", file).write_text(text)
        said = ""
        for token in where.split():
            passed, said = ran(room, *selected(token))
            if not passed:
                return False, said
    return True, said


def ran(room: str, *which: str) -> tuple[bool, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", *which]
    environment = {**os.environ, "PYTHONPATH": room, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True)
    lines = [line[1:].strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    return done.returncode == 0, (lines or done.stdout.splitlines()[-1:] or [done.stderr[-200:]])[0][:140]


def selected(token: str) -> list[str]:
    file, _, tests = token.partition("/")
    if file.startswith("@"):
        path = f"tests/variants/test_{file[1:]}.py"
    else:
        path = FILES.get(file) or f"tests/contract/test_life.py::test_life[{file}]"
    return [path, "-k", tests] if tests else [path]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
