"""The interface that every variant is written against. Reading order: site, delta, low_rank, part, adapter."""

from .adapter import Adapter
from .continual import Continual, Memory, used
from .delta import Additive, Copy, Delta, alike, exact, flat, kronecker, linear, numbers
from .elastic import Elastic
from .low_rank import LowRank
from .part import Decomposition, Init, Part, Posterior, Stage, Step, Structure
from .peft import Peft
from .singular import Singular
from .site import Base, Site
from .sparse import Sparse
from .staged import Staged
from .turned import Turned
from .wrapper import Wrapper, length

__all__ = [
    "Adapter",
    "Additive",
    "Base",
    "Continual",
    "Copy",
    "Decomposition",
    "Delta",
    "Elastic",
    "Init",
    "LowRank",
    "Memory",
    "Part",
    "Peft",
    "Posterior",
    "Site",
    "Sparse",
    "Singular",
    "Stage",
    "Staged",
    "Step",
    "Structure",
    "Turned",
    "Wrapper",
    "alike",
    "exact",
    "flat",
    "kronecker",
    "length",
    "linear",
    "numbers",
    "used",
]
