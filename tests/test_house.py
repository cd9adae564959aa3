"""The floors of the house: imports run one way, nobody reaches into another file's private names, files stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("contracts", "models", "pipelines", "evaluation", "trainers", "serve", "cxray")
FILES = sorted([p for room in FLOORS for p in (ROOT / room).rglob("*.py")] + [ROOT / "cxray.py", *(ROOT / "cluster").rglob("*.py")])


def floor(name: str) -> int:
    """The floor of a module's first part; `cluster` stands just below the front door; -1 is from outside."""
    top = name.partition(".")[0]
    return len(FLOORS) - 2 if top == "cluster" else FLOORS.index(top) if top in FLOORS else -1


def imports(file: Path) -> list[tuple[str, list[str]]]:
    """(module, names) of all imports of a file, those inside functions too; the front door's table of verbs counts as imports."""
    tree = ast.parse(file.read_text())
    found = [(a.name, []) for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    return found + [(node.module or "", [a.name for a in node.names]) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_down_the_floors(file: Path):
    own = floor(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for module, names in imports(file):
        assert floor(module) <= own, f"{file.name} imports {module}, which stands above it"
        if floor(module) >= 0:
            assert not [n for n in names if n.startswith("_")], f"{file.name} takes a private name of {module}"


def test_no_circle():
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    needs = {
        m: {n for n, names in imports(f) for n in (n, *(f"{n}.{x}" for x in names)) if n in modules and n != m} for m, f in modules.items()
    }
    while done := [m for m, n in needs.items() if not n]:
        for module in done:
            del needs[module]
        for rest in needs.values():
            rest.difference_update(done)
    assert not needs, f"these import each other in a circle: {sorted(needs)}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_is_a_thought(file: Path):
    assert len(file.read_text().splitlines()) <= 400


def test_ray_stays_out_of_models_and_contracts():
    for file in FILES:
        if file.relative_to(ROOT).parts[0] in ("contracts", "models"):
            assert not [m for m, _ in imports(file) if m.partition(".")[0] == "ray"], file
