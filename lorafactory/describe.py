"""`lorafactory variants`, `show` and `targets`: what there is, before anything runs."""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import fields
from typing import Any

from . import registry
from .adapter.site import Base, is_linear, role
from .attach import Adapted
from .errors import UserError
from .targets import head_modules, inside, tied


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{self.prog}: {message}")


def variants(arguments: list[str]) -> int:
    parser = Parser(prog="lorafactory variants", description="every registered name: axis, paper, one line")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    rows = [_about(registry.get(n)) for a in registry.AXES for n in registry.names(a)]
    if chosen.json:
        print(json.dumps(rows, indent=1))
        return 0
    widths = {k: max(len(r[k]) for r in rows) for k in ("name", "axis", "paper")}
    for r in rows:
        print("  ".join([*(r[k].ljust(w) for k, w in widths.items()), r["summary"]]))
    return 0


def _about(cls: Any) -> dict[str, str]:
    text = inspect.getdoc(cls) or ""
    return {"name": cls.name, "axis": "+".join((cls.axis, *cls.also)), "paper": cls.paper, "summary": text.partition("\n")[0]}


def show(arguments: list[str]) -> int:
    parser = Parser(prog="lorafactory show", description="a variant's equation, options and cost")
    parser.add_argument("name", help="a name or a composite, e.g. dora+pissa")
    parser.add_argument("--model", default="minilm", help="preset of configs/model on which to count (default: minilm)")
    chosen = parser.parse_args(arguments)
    config = registry.config(chosen.name)
    named = {n.strip() for n in chosen.name.split("+")}
    for cls in registry.chosen(config):
        if cls.name not in named:
            continue
        print(f"{cls.name}  ({'+'.join((cls.axis, *cls.also))}; {cls.paper})\n")
        print(_indent(inspect.getdoc(cls) or ""))
        prefix = "variant" if cls.axis == "structure" else f"variant.{cls.axis}"
        options = [f.name for f in fields(cls.Config) if f.name not in (*registry.PARTS, "name")]
        print("\n  options:" if options else "\n  no options")
        for name in options:
            print(f"    {prefix}.{name}={getattr(cls.Config(), name)}")
        for word in ("needs", "gives", "does", "minds"):
            if said := getattr(cls, word, ()):
                print(f"  {word}: {', '.join(sorted(said))}")
        print()
    adapted = Adapted(base_model(chosen.model), config, 0)
    cost = adapted.cost()
    adapted.detach()
    share = cost["adapter_parameters"] / cost["total_parameters"]
    print(f"on {chosen.model}: {cost['adapter_parameters']:,} trainable parameters "
          f"({share:.3%} of {cost['total_parameters']:,}), "
          f"and {cost['head_parameters']:,} of the head")  # fmt: skip
    return 0


def linear_layers(model: Any) -> list[dict[str, Any]]:
    """Linear layers grouped by role (the name with block numbers replaced by *), shape and count."""
    heads, shared = head_modules(model), tied(model)
    found: dict[tuple, dict[str, Any]] = {}
    for name, m in model.named_modules():
        if not is_linear(m):
            continue
        place, shape = role(name), tuple(Base(m).weight.shape)
        note = "head, trained whole" if inside(name, heads) else "shares its weight" if m in shared else ""
        row = {"role": place, "d_out": shape[0], "d_in": shape[1], "layer": type(m).__name__, "count": 0, "note": note}
        found.setdefault((place, shape), row)["count"] += 1
    return list(found.values())


def targets(arguments: list[str]) -> int:
    parser = Parser(prog="lorafactory targets", description="what of a model can be adapted, by role, shape and count")
    parser.add_argument("model", help="a preset of configs/model, a folder or a hub id")
    rows = linear_layers(base_model(parser.parse_args(arguments).model))
    width = max((len(r["role"]) for r in rows), default=0)
    for r in rows:
        print(f"{r['role']:{width}}  {r['layer']} [{r['d_out']}, {r['d_in']}]  x {r['count']}  {r['note']}".rstrip())
    return 0


def base_model(name: str) -> Any:
    """The model of a preset, folder or hub id, with a head of two classes where it has one."""
    from omegaconf import OmegaConf

    from . import paths
    from .models import ModelConfig, load
    from .tasks import get_task

    preset = paths.configs() / "model" / f"{name}.yaml"
    options: Any = OmegaConf.to_container(OmegaConf.load(preset)) if preset.exists() else {"name": "given", "source": name}
    options.pop("defaults", None)
    config = registry.fill(ModelConfig, options, f"model {name!r}")
    refusals = []
    for kind in ("toy", "image"):  # who reads text, and who reads pictures
        cls: Any = get_task(kind)
        task = cls(cls.Config(kind=kind, name=kind))
        task.labels = ["one", "other"]
        try:
            return load(config, task).model
        except UserError as e:
            refusals.append(e)
    raise refusals[0]


def _indent(text: str) -> str:
    return "\n".join(("  " + line).rstrip() for line in text.splitlines())
