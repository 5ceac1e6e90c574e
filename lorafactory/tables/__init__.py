"""Tables and plots from records alone.

    table = build(load("glue"), "results");  write(table, Path("results/tables"))

spec (YAML -> Spec) -> build (records -> rows) with cells (selection), fair (what may be compared) and notes (what a
table must say) -> render, plot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..files import write_whole
from . import render
from .build import Table, build
from .spec import Spec, available, load

__all__ = ["Spec", "Table", "build", "load", "main", "write"]


def write(table: Table, folder: str | Path) -> list[Path]:
    """<folder>/<name>.md, .tex, .csv, and .png and .pdf unless the spec says `plot: false`. Each file is whole or not
    there; raises UserError if the folder cannot be written."""
    folder, name = Path(folder), table.spec.name
    files = {".md": render.markdown, ".tex": render.latex, ".csv": render.numbers}
    content = {suffix: make(table).encode() for suffix, make in files.items()}
    if table.spec.plot and any(cell.values for row in table.rows for cell in row.cells.values()):
        from .plot import draw

        content |= draw(table)
    paths = [folder / f"{name}{suffix}" for suffix in content]
    for path, data in zip(paths, content.values(), strict=True):
        write_whole(path, data)
    return paths


def main(argv: Sequence[str]) -> int:
    """`lorafactory table SPEC`."""
    parser = argparse.ArgumentParser("lorafactory table", description="A table and a plot from records alone.",
                                     epilog=f"Tables here: {', '.join(available())}")  # fmt: skip
    parser.add_argument("spec", help="a name under configs/table, or the path of a .yaml file")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of records (results)")
    parser.add_argument("--with-scratch", action="store_true", help="also failed runs and those of changed code")
    parser.add_argument("--missing", action="store_true",
                        help="only print the commands that run the seeds which selected points lack")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder to write to (RESULTS/tables; RESULTS/scratch/tables)")
    given = parser.parse_args(argv)
    table = build(load(given.spec), given.results, given.with_scratch)
    if given.missing:
        print("\n".join(dict.fromkeys(table.missing())))  # once, however many metrics of a run are shown
        return 0
    print(render.text(table))
    below = given.results / "scratch" if given.with_scratch else given.results
    for path in write(table, given.out or below / "tables"):
        print(f"wrote {path}")
    return 0
