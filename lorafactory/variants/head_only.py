from ..adapter import Structure
from ..registry import register


@register("head_only")
class HeadOnly(Structure):
    """Linear probe: only the task head trains, on features of the frozen base (its dropout is off)."""

    paper = "the reference"

    def build(self, site, make):
        return None
