"""Names -> classes -> typed configs, and which composites are legal. Knows neither torch nor Hydra.

A variant's name chooses one part on one axis; `dora+pissa+lora_plus` chooses several. The config of a composite is
the structure's dataclass with one field an axis:

    StructureConfig(rank=8, decomposition=DoRA.Config(), init=PiSSA.Config(niter=16), ...)
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from typing import Any, List, Optional  # noqa: UP035  OmegaConf 2.3 resolves these spellings on every supported Python

from .errors import UserError

# also the order in which hooks run
AXES = ("structure", "decomposition", "budget", "init", "routing", "continual", "dynamics", "posterior")
PARTS = AXES[1:]
WRAPPING = ("decomposition", "routing")  # parts whose build() wraps deltas: they define the function too
_classes: dict[str, type] = {}


@dataclass
class Named:
    """Every config carries its variant's name, so that --cfg job and a record's JSON say what was chosen."""

    name: str = ""

    def __post_init__(self) -> None:
        own = getattr(getattr(type(self), "owner", None), "name", "")
        if self.name not in ("", own):
            raise UserError(f"this config is {own!r}; choose another by variant={self.name}, not by its name field")
        self.name = own
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{f.name} is {value}; it must be a finite number")
        if own:
            self.check()

    def check(self) -> None:
        """Refuse values that make no sense: a variant's Config overrides this and raises UserError."""

    def given(self, *names: str) -> Iterable[tuple[str, Any]]:
        """(what it is called, its value) of options that are not null, and of each entry of a pattern."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, dict):
                yield from ((f"{name} {key!r}", entry) for key, entry in value.items())
            elif value is not None:
                yield name, value

    def check_least(self, least: int, *names: str) -> None:
        """Refuse options below `least`."""
        for what, value in self.given(*names):
            if value < least:
                raise UserError(f"{what} is {value}; it must be at least {least}")

    def check_positive(self, *names: str) -> None:
        """Refuse options that are 0 or less."""
        for what, value in self.given(*names):
            if value <= 0:
                raise UserError(f"{what} is {value}; it must be positive")

    def check_shares(self, *names: str) -> None:
        """Refuse options that are no share, from 0 to below 1."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")

    def check_choices(self, **allowed: Iterable[str | None]) -> None:
        """Refuse options that are none of the words allowed."""
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise UserError(f"{name} is {getattr(self, name)!r}; it takes {', '.join(filter(None, words))}")

    def check_not_zero(self, *names: str) -> None:
        """Refuse 0 for what multiplies the update."""
        for what, value in self.given(*names):
            if value == 0:
                raise UserError(f"{what} is 0: the update would be zero for ever")

    def check_seeds(self, *names: str) -> None:
        """Refuse what no generator takes."""
        for name in names:
            if not 0 <= getattr(self, name) < 2**63:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie in [0, 2^63)")


# One empty config an axis: the field's type, and its "nothing here" value.
@dataclass
class DecompositionConfig(Named): ...


@dataclass
class BudgetConfig(Named): ...


@dataclass
class InitConfig(Named): ...


@dataclass
class RoutingConfig(Named): ...


@dataclass
class ContinualConfig(Named): ...


@dataclass
class DynamicsConfig(Named): ...


@dataclass
class PosteriorConfig(Named): ...


@dataclass
class StructureConfig(Named):
    """target_modules: names, dotted suffixes, regular expressions, `all-linear` or `all`; one or a list of them.
    trained_modules: modules trained whole, as copies; null: the model's task head, where it has one."""

    target_modules: Any = "all-linear"
    trained_modules: Optional[List[str]] = None  # noqa: UP006, UP045
    decomposition: DecompositionConfig = field(default_factory=DecompositionConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    init: InitConfig = field(default_factory=InitConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)

    def __post_init__(self) -> None:
        wanted = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        if not (isinstance(wanted, Iterable) and wanted and all(isinstance(w, str) and w for w in wanted)):
            raise UserError(f"target_modules is {self.target_modules!r}; it takes a name or a list of names")
        self.target_modules = list(wanted)
        super().__post_init__()
        if self.name:
            check(self)

    def gives(self) -> frozenset[str]:
        """The capability words under these options: the structure's, less what an option takes away, and what it adds."""
        return self.owner.gives  # type: ignore[attr-defined]


CONFIGS: dict[str, type[Named]] = {
    "structure": StructureConfig,
    "decomposition": DecompositionConfig,
    "budget": BudgetConfig,
    "init": InitConfig,
    "routing": RoutingConfig,
    "continual": ContinualConfig,
    "dynamics": DynamicsConfig,
    "posterior": PosteriorConfig,
}


def register(name: str) -> Callable[[type], type]:
    """Class decorator, the whole registration: publishes the class and its nested dataclass Config under `name`.

    Raises UserError if the name is taken or cannot be spelled in a composite."""

    def add(cls: type) -> type:
        if not name.replace("_", "").isalnum() or name != name.lower():
            raise UserError(f"variant name {name!r}: use lower-case letters, digits and underscores")
        if name in _classes:
            first = _classes[name]
            raise UserError(f"variant {name!r} is registered twice: {first.__module__} and {cls.__module__}")
        own, base = getattr(cls, "Config", None), CONFIGS[cls.axis]  # type: ignore[attr-defined]
        if own is not None and "__dataclass_fields__" not in own.__dict__:
            own = dataclass(own)
        bases = (base,) if own is None else (own,) if issubclass(own, base) else (own, base)
        # a class of its own even where Config is inherited: `owner` says which variant a config chooses
        made: Any = dataclass(type("Config", bases, {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}))
        made.__name__ = f"{cls.__name__}.Config"  # what OmegaConf's errors print
        made.owner, cls.Config, cls.name = cls, made, name  # type: ignore[attr-defined]
        _classes[name] = cls
        return cls

    return add


def names(axis: str | None = None) -> list[str]:
    return sorted(n for n, c in _classes.items() if axis in (None, c.axis))  # type: ignore[attr-defined]


def nearest(name: str, among: Iterable[str]) -> str:
    """The end of an error message: what the user may have meant."""
    known = sorted(among)
    near = difflib.get_close_matches(name, known, 3, 0.4)
    return f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(known)}"


def get(name: str) -> Any:
    if name not in _classes:
        raise UserError(f"no variant {name!r}; {nearest(name, _classes)} (`lorafactory variants` lists all)")
    return _classes[name]


def parse(spelling: str) -> list[Any]:
    """'dora+pissa' -> its classes in AXES order, the structure included."""
    classes = [get(n.strip()) for n in spelling.split("+")]
    taken: dict[str, Any] = {}
    for c in classes:
        if c.axis in taken:
            both = f"{taken[c.axis].name!r} and {c.name!r} both choose the {c.axis}"
            raise UserError(f"{both}; a composite has at most one an axis: drop one of them")
        taken[c.axis] = c
    taken.setdefault("structure", _standing(classes))
    return [taken[a] for a in AXES if a in taken]


def _standing(parts: list[Any]) -> Any:
    """The structure of parts that are named without one: what one of them stands on, or the default one."""
    over = next((c.over for c in parts if c.over), None)
    found = [c for c in _classes.values() if c.axis == "structure" and c.default]  # type: ignore[attr-defined]
    return get(over) if over else found[0]


def config(spelling: str, **options: Any) -> Any:
    """The typed config of a composite. An option is a field of the structure, or an axis with a dict of fields.

    Raises UserError for an unknown name or option, a wrong type, or an illegal composite."""
    structure, *parts = parse(spelling)
    chosen_axes = {c.axis: c for c in parts}
    made = {}
    for axis, cls in chosen_axes.items():
        made[axis] = fill(cls.Config, options.pop(axis, None) or {}, f"{axis} {cls.name!r}")
    for axis in set(options) & set(PARTS):
        raise UserError(f"options for the {axis}, but {spelling!r} chooses none: add one of {', '.join(names(axis))}")
    return fill(structure.Config, options, f"variant {structure.name!r}", made)


def fill(cls: type, options: Any, what: str, given: dict[str, Any] | None = None) -> Any:
    """cls(**options), type-checked by OmegaConf as the command line would; `given` is passed as it is."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(options, cls):
        return options
    if not isinstance(options, dict):
        raise UserError(f"{what}: options are {options!r}; give a dict or its own Config")
    known = [f.name for f in fields(cls) if f.name not in PARTS]
    for key in options:
        if key not in known:
            raise UserError(f"{what} has no option {key!r}; {nearest(key, set(known) - {'name'})}")
    if not options:
        return cls(**(given or {}))
    try:
        typed = OmegaConf.merge(OmegaConf.structured(cls), options)
        values = {f.name: getattr(OmegaConf.to_object(typed), f.name) for f in fields(cls) if f.name in options}
    except OmegaConfBaseException as e:
        raise UserError(f"{what}: {str(e).splitlines()[0]}") from None
    return cls(**values, **(given or {}))


def chosen(cfg: Any) -> list[Any]:
    """The classes that a config chooses, in AXES order."""
    return [c.owner for c in (type(cfg), *(type(getattr(cfg, a)) for a in PARTS)) if hasattr(c, "owner")]


def spell(cfg: Any) -> str:
    """The stable name of a composite: its shortest spelling, in AXES order, whatever was typed."""
    classes = chosen(cfg)
    short = "+".join(c.name for c in classes[1:])
    implied = short and parse(short)[0] is classes[0]
    return short if implied else "+".join(c.name for c in classes)


def check(cfg: Any) -> None:
    """One part an axis; nothing that another part minds; every word a part needs is given by the structure."""
    structure, *parts = chosen(cfg)
    taken: dict[str, Any] = {}
    for c in (structure, *parts):
        for axis in (c.axis, *c.also):
            if axis in taken:
                raise UserError(f"{taken[axis].name!r} and {c.name!r} both decide the {axis}: drop one of them")
            taken[axis] = c
    for p in parts:
        for q in (structure, *parts):
            if clash := sorted(p.minds & q.does):
                raise UserError(f"{p.name!r} does not work with {q.name!r} ({', '.join(clash)}): drop one of them")
        if lack := sorted(p.needs - cfg.gives()):
            so = " under these options" if p.needs <= structure.gives else ""
            able = [n for n in names("structure") if p.needs <= _classes[n].gives]  # type: ignore[attr-defined]
            raise UserError(
                f"{p.name!r} needs a structure with {', '.join(lack)}, which {structure.name!r} has not{so}; "
                f"these have: {', '.join(able)}"
            )


def part_config(axis: str, name: str) -> Any:
    """The config of one part, for the nested group variant/<axis>."""
    if name not in names(axis):
        raise UserError(f"no {axis} {name!r}; {nearest(name, names(axis))}")
    return get(name).Config()


def from_dict(data: dict[str, Any]) -> Any:
    """The typed config that dataclasses.asdict wrote (a checkpoint, a record)."""
    if not isinstance(data, dict) or not data.get("name"):
        raise UserError(f"a config without a variant's name: {str(data)[:80]}")
    spelling = "+".join(n for n in (data["name"], *((data.get(a) or {}).get("name") for a in PARTS)) if n)
    options = {k: v for k, v in data.items() if k not in PARTS}
    options |= {a: data[a] for a in PARTS if (data.get(a) or {}).get("name")}
    return config(spelling, **options)


def discover() -> None:
    """Import every module of lorafactory.variants and every entry point of the group `lorafactory.variants`.

    An import error is not caught: a variant that cannot be imported must not vanish from a comparison."""
    package = importlib.import_module("lorafactory.variants")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    for point in entry_points(group="lorafactory.variants"):
        point.load()
