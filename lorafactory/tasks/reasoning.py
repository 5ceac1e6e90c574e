"""Puzzles of reasoning-gym (arXiv 2505.24760), made on the spot and checked by its own verifiers: no hub, no files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Dict  # noqa: UP035  OmegaConf's spelling

from ..errors import UserError
from ..registry import nearest
from . import SPLITS, register_task
from .dialogue import Pair
from .generation import Generation

APART = 10_000_000  # between the seeds of the splits: puzzle i of seed s is puzzle 0 of seed s + i
SETTLED = ("source", "subset", "prompt", "completion", "scorer", "revision", "test_source", "test_split", "selection_split")
TRIES = 20  # puzzles made for one that no other row holds


@register_task("reasoning")
class Reasoning(Generation):
    """A split's puzzles depend on split_seed and on the splits scored before it: no prompt comes twice."""

    @dataclass
    class Config(Generation.Config):
        """generator: reasoning-gym's name; options: its own, as {min_terms: 2}; *_size: puzzles made for each split."""

        kind: str = "reasoning"
        source: str = "package:reasoning-gym"
        generator: str = ""
        options: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
        selection_split: str = "selection"
        train_size: int = 2000
        selection_size: int = 100
        test_size: int = 200

        def __post_init__(self) -> None:
            super().__post_init__()
            plain = Reasoning.Config.__dataclass_fields__
            for option in SETTLED:
                if getattr(self, option) != plain[option].default:
                    raise UserError(f"task.{option}={getattr(self, option)} has no effect on made puzzles: leave it out")
            for split in SPLITS:
                if getattr(self, f"{split}_size") < 1:
                    raise UserError(f"task.{split}_size=0: puzzles are made, so say how many")

    def _made(self, seed: int, size: int) -> Any:
        try:
            import reasoning_gym
        except ImportError as e:
            raise UserError(f"task.kind=reasoning needs the package reasoning-gym ({e}): pip install reasoning-gym") from e
        name = self.config.generator
        if name not in reasoning_gym.factory.DATASETS:
            raise UserError(f"task.generator={name!r}: no such puzzle; {nearest(name, reasoning_gym.factory.DATASETS)}")
        try:
            return reasoning_gym.create_dataset(name, seed=seed, size=size, **self.config.options)
        except (TypeError, ValueError, AssertionError) as e:
            raise UserError(f"task.options={dict(self.config.options)} do not suit {name}: {e}") from e

    @cached_property
    def verifier(self) -> Any:
        return self._made(0, 1)

    def read(self) -> dict[str, list[Pair]]:
        seen: set[str] = set()
        found = {}
        for i, split in enumerate(reversed(SPLITS)):
            size = getattr(self.config, f"{split}_size")
            made, rows = self._made(self.config.split_seed + i * APART, TRIES * size), []
            for k in range(TRIES * size):
                entry = made[k]
                if entry["question"] not in seen:
                    seen.add(entry["question"])
                    rows.append(Pair(entry["question"], str(entry["answer"]), _plain(entry), f"{split} puzzle {k}"))
                if len(rows) == size:
                    break
            else:
                raise UserError(f"task.{split}_size={size}: {self.config.generator} has only {len(rows)} more puzzles; "
                                "ask for fewer or widen task.options")  # fmt: skip
            found[split] = rows
        return found

    def check(self, pair: Pair) -> None:
        if self.verifier.score_answer(pair.completion, pair.reference) != 1:
            raise UserError(f"{pair.place}: {self.config.generator} does not take its own answer {pair.completion!r}")

    def mark(self, answered: list[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
        """exact_match: verified as wholly right; score: the verifier's own mean, which may give parts."""
        texts = [(text.strip(), entry) for p, entry in answered for text in p["texts"]]
        scores = [float(self.verifier.score_answer(text, entry)) for text, entry in texts]
        return {
            "exact_match": sum(s >= 1 for s in scores) / len(scores),
            "score": sum(scores) / len(scores),
            "no_answer": sum(not text for text, _ in texts) / len(texts),
        }

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        about = {"name": self.config.generator, "options": dict(self.config.options), "version": version("reasoning-gym")}
        return super().describe() | {"generator": about}


def _plain(entry: dict[str, Any]) -> Any:
    return json.loads(json.dumps(entry, default=str))
