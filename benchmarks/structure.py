"""How the house is built: `python benchmarks/structure.py [FOLDER]` counts rooms, floors, arrows and circles.

A room is a package below engine/, or a file beside the packages; models/ and benchmarks/ are one each. An arrow leads
from a room to another one that it imports from, wherever in a file the import stands. The floors are the longest way
along arrows, circles counted as one room. The same is counted for single files, which shows the circles within a room.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator
from pathlib import Path

Arrows = dict[str, set[str]]


def modules(folder: Path) -> dict[str, Path]:
    """The program's files by their dotted names."""
    files = [
        *folder.glob("*.py"),
        *(file for top in ("engine", "models", "benchmarks") for file in folder.rglob(f"{top}/**/*.py")),
    ]
    names = {".".join(file.relative_to(folder).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items() if not name.startswith((".", "tests"))}


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The program's modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else node.module


def room(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "engine" else parts[0]


def drawn(folder: Path, name: Callable[[str], str]) -> Arrows:
    """The arrows between what `name` makes of the modules; packages' own docstrings are no place to stand in."""
    known = modules(folder)
    arrows: Arrows = {name(module): set() for module, file in known.items() if file.name != "__init__.py"}
    for module, file in known.items():
        if file.name != "__init__.py":
            arrows[name(module)] |= {name(other) for other in imported(file, known)} - {name(module)}
    return {start: {end for end in ends if end in arrows} for start, ends in arrows.items()}


def reached(arrows: Arrows, start: str) -> set[str]:
    """All that arrows lead to."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = arrows[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def circles(arrows: Arrows) -> set[frozenset[str]]:
    """The sets of those that lead to each other."""
    ways = {start: reached(arrows, start) for start in arrows}
    return {frozenset(end for end in ways[start] if start in ways[end]) for start in arrows if start in ways[start]}


def floors(arrows: Arrows) -> int:
    """Rooms on the longest way along the arrows."""
    member = {one: circle for circle in circles(arrows) for one in circle}
    known: dict[object, int] = {}

    def height(one: str) -> int:
        own = member.get(one, frozenset([one]))
        if own not in known:
            beyond = {end for other in own for end in arrows[other]} - own
            known[own] = 1 + max(map(height, beyond), default=0)
        return known[own]

    return max(map(height, arrows))


def main() -> None:
    """Print the figures of a checkout, then what each room imports from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    folder = parser.parse_args().folder
    for what, name in (("rooms", room), ("files", str)):
        arrows = drawn(folder, name)
        found = circles(arrows)
        number = sum(map(len, arrows.values()))
        print(f"{len(arrows)} {what}, {floors(arrows)} floors, {number} arrows, {len(found)} circles")
        for circle in found:
            print(f"  circle: {', '.join(sorted(circle))}")
    lines = sum(
        len(file.read_text(encoding="utf-8").splitlines())
        for name, file in modules(folder).items()
        if room(name).startswith("engine")
    )
    print(f"{lines:,} lines in engine/\n")
    for start, ends in sorted(drawn(folder, room).items()):
        print(f"{start:18} {' '.join(sorted(ends))}")


if __name__ == "__main__":
    main()
