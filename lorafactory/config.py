"""The typed config of a run, and its publication to Hydra. After load() nobody sees OmegaConf again.

Code becomes ConfigStore nodes, data lies as YAML under configs/. Variants are made when Hydra asks for
`variant/<spelling>`, so every legal composite can be chosen and swept without a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, List, Optional  # noqa: UP035  as in registry

from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import MISSING, OmegaConf

from . import registry, tasks
from .errors import UserError
from .models import ModelConfig


@dataclass
class TrainConfig:
    """batch_size: examples an optimiser step, over all processes; micro_batch_size: examples a forward pass (0: all at
    once); steps, or where that is 0, epochs; warmup: share of the steps; clip: gradient norm (0: none); eval_every,
    checkpoint_every: in steps (0: never); patience: evaluations without a better selection score before stopping
    (0: never); keep: score the last step or the one with the best selection score; head_lr: of the trained head
    (null: lr); shard: fsdp2 spreads the base over the processes (null: each holds it whole)."""

    lr: float = 1e-3
    head_lr: Optional[float] = None  # noqa: UP045
    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch_size: int = 0
    eval_batch_size: int = 64
    optimizer: str = "adamw"
    betas: List[float] = field(default_factory=lambda: [0.9, 0.999])  # noqa: UP006
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup: float = 0.06
    clip: float = 1.0
    precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    eval_every: int = 0
    patience: int = 0
    keep: str = "last"
    checkpoint_every: int = 0
    shard: Optional[str] = None  # noqa: UP045

    def __post_init__(self) -> None:
        one_of = {
            "optimizer": ("adamw", "sgd"),
            "schedule": ("linear", "cosine", "constant"),
            "precision": ("no", "bf16", "fp16"),
            "keep": ("last", "best"),
        }
        for key, allowed in one_of.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"train.{key} is {getattr(self, key)!r}; it takes {', '.join(allowed)}")
        for key in ("lr", "batch_size", "eval_batch_size", "epochs"):
            if not getattr(self, key) > 0:
                raise UserError(f"train.{key} is {getattr(self, key)}; it must be positive")
        for key in ("steps", "micro_batch_size", "eval_every", "patience", "checkpoint_every", "clip", "weight_decay"):
            if getattr(self, key) < 0:
                raise UserError(f"train.{key} is {getattr(self, key)}; it must not be negative")
        if self.shard not in (None, "fsdp2"):
            raise UserError(f"train.shard is {self.shard!r}; it takes fsdp2, or null for a whole base in each process")
        if self.shard and self.compile:
            raise UserError("train.shard and train.compile do not go together here: leave one out")
        if not 0 <= self.warmup < 1:
            raise UserError(f"train.warmup is {self.warmup}; it is a share of the steps, in [0, 1)")
        if (self.patience or self.keep == "best") and not self.eval_every:
            raise UserError("train.patience and train.keep=best compare evaluations: set train.eval_every")


@dataclass
class ResultsConfig:
    """folder: where records go; experiment: under which name; keep_adapter: keep the trained adapter in
    <folder>/adapters/<id>."""

    folder: str = "results"
    experiment: str = "adhoc"
    keep_adapter: bool = False


@dataclass
class WandbConfig:
    """mode: disabled, offline or online; what is sent is what the record holds."""

    mode: str = "disabled"
    project: str = "lorafactory"

    def __post_init__(self) -> None:
        if self.mode not in ("disabled", "offline", "online"):
            raise UserError(f"wandb.mode is {self.mode!r}; it takes disabled, offline, online")


@dataclass
class RunConfig:
    """kernels: auto, reference, eager or triton: which implementation of kernels.* runs, see docs/kernels.md."""

    model: ModelConfig = MISSING
    task: tasks.Task.Config = MISSING
    variant: registry.StructureConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    kernels: str = "auto"
    results: ResultsConfig = field(default_factory=ResultsConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


class _Group(dict):
    """One group of the ConfigStore whose options are made when Hydra first asks for them. It writes to itself, never
    to ConfigStore.instance(): Hydra deep-copies the store for --cfg and multirun."""

    def __init__(self, group: str, make: Callable[[str], Any], options: dict | Iterable = ()):
        super().__init__(options)
        self.group, self.make = group, make

    def __contains__(self, key: object) -> bool:
        name = str(key).removesuffix(".yaml")
        # Hydra also asks for a group's own name when listing, and for "None" for a default that is null
        if dict.__contains__(self, key) or name == key or name in (*registry.AXES, "None"):
            return dict.__contains__(self, key)
        try:
            node = OmegaConf.structured(self.make(name))
        except UserError as e:
            raise ConfigCompositionException(f"{self.group}={name}: {e}") from None
        self[key] = ConfigNode(str(key), node, self.group, None, "lorafactory")
        return True


def publish() -> None:
    """Make models, tasks and variants known to Hydra. Asks for every single name, so that lists and <TAB> show them."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for kind, cls in tasks.tasks().items():
        store.store(group="task/kind", name=kind, node=cls.Config)
    groups = {a: _Group(f"variant/{a}", partial(registry.part_config, a)) for a in registry.PARTS}
    store.repo["variant"] = _Group("variant", registry.config, groups)
    for n in registry.names():
        _ = f"{n}.yaml" in store.repo["variant"]
    for axis, group in groups.items():
        for n in registry.names(axis):
            _ = f"{n}.yaml" in group


def _pick(key: str, table: Any, otherwise: Any = None) -> Any:
    """${pick:${hydra:runtime.choices.variant},{full:3e-4},3e-3}: a value of its own for some choices of a sweep."""
    return table.get(key, otherwise) if hasattr(table, "get") else otherwise


OmegaConf.register_new_resolver("pick", _pick, replace=True)  # on import: in the processes of a launcher, too


def load(cfg: Any) -> RunConfig:
    """Hydra's config as dataclasses. Raises UserError where a choice is illegal or a value missing."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        made = OmegaConf.to_object(cfg)
    except UserError:
        raise
    except OmegaConfBaseException as e:
        raise UserError(str(e).splitlines()[0]) from None
    if not isinstance(made, RunConfig):
        raise UserError(f"the config is a {type(made).__name__}, not a run's: start from config_name=config")
    return made
