from dataclasses import dataclass

from ..adapter import Structure
from ..errors import UserError
from ..registry import StructureConfig, register


@register("head_only")
class HeadOnly(Structure):
    """Linear probe: only the task head trains, on features of the frozen base (its dropout is off)."""

    paper = "the reference"

    @dataclass
    class Config(StructureConfig):
        def check(self):
            if self.target_modules != ["all-linear"]:
                raise UserError(
                    f"target_modules={self.target_modules} has no meaning here: no layer is adapted; leave it out"
                )

    def build(self, site, make):
        return None
