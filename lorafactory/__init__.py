"""lorafactory: low-rank adapters behind one interface.

    import lorafactory
    adapted = lorafactory.attach(model, "dora+pissa", rank=8, target_modules=["query", "value"])

Reading order: adapter/ (the interface), registry, targets, holder, attach, optim, checkpoint; then run."""

from . import registry
from .adapter import Decomposition, Delta, Init, LowRank, Part, Structure
from .attach import Adapted, attach
from .checkpoint import load
from .errors import UserError
from .merged import export_merged
from .peft_folder import export_lora, export_peft
from .registry import register
from .version import __version__

registry.discover()

__all__ = [
    "Adapted",
    "Decomposition",
    "Delta",
    "Init",
    "LowRank",
    "Part",
    "Structure",
    "UserError",
    "__version__",
    "attach",
    "export_lora",
    "export_merged",
    "export_peft",
    "load",
    "register",
]
