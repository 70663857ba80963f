"""The arrows between modules point one way; nothing heavy or dangerous is imported where it need not be."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ringmark.watermark.schemes  # noqa: F401  registers those that come with ringmark
from ringmark.watermark.schemes.base import REGISTRY, published_statistics

ROOT = Path(__file__).parents[1]
PACKAGES = ("ringmark", "inversion", "watermark", "data")


def module_name(path: Path) -> str:
    """The name under which a file is installed: folders at the top are rooms of the package `ringmark`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("ringmark") else f"ringmark.{name}"


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), path.name) for name, path in FILES.items()}


def imported(nodes) -> set[str]:
    """Modules named by the import statements among `nodes`: ours in full, others as they stand."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & set(FILES) or {node.module}
    return found


def at_import(tree: ast.Module):
    """Statements that run when a module is imported: all but those in functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from at_import(node)


EVER = {name: imported(ast.walk(tree)) for name, tree in TREES.items()}
AT_ONCE = {name: imported(at_import(tree)) for name, tree in TREES.items()}


ROOMS = {
    "ringmark.errors": 0,
    "ringmark.data": 1,
    "ringmark.inversion": 1,
    "ringmark.watermark.statistics": 2,
    "ringmark.watermark.keys": 2,
    "ringmark.watermark.null": 3,
    "ringmark.watermark.schemes": 4,
    "ringmark.watermark.bank": 5,
    "ringmark.watermark.calibration": 6,
    "ringmark.watermark.embed": 6,
    "ringmark.watermark.attacks": 6,
    "ringmark.watermark.detect": 7,
    "ringmark.watermark.figures": 8,
    "ringmark.watermark.evaluation": 9,
    "ringmark.watermark.tasks": 10,
    "ringmark.watermark.service": 11,
    "ringmark.watermark.cli": 12,
    "ringmark": 13,
}
"""How high each room lies: imports point to lower rooms, or stay in the room."""


def top(name: str) -> str:
    return name.partition(".")[0]


def room(name: str) -> str:
    """The room that a module is in, or lies nearest to."""
    return next(r for r in sorted(ROOMS, key=len, reverse=True) if name == r or name.startswith(f"{r}."))


def inside(name: str) -> set[str]:
    """The rooms of ours that a module imports from, itself apart; a package by itself holds nothing."""
    return {room(m) for m in EVER[name] if m in FILES and m not in ("ringmark.data", "ringmark.inversion")}


def test_the_files_are_found():
    assert {"ringmark", "ringmark.watermark.cli.main", "ringmark.data.files", "ringmark.inversion.solve"} <= set(FILES)
    assert "ringmark.inversion.solve" in EVER["ringmark.inversion.decoder"]
    assert "torch" in AT_ONCE["ringmark.inversion.solve"]
    assert not {m for m in AT_ONCE["ringmark.watermark.cli.main"] if m.startswith("ringmark.watermark.tasks")}


def test_every_package_is_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    assert listed == {name for name, path in FILES.items() if path.name == "__init__.py"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_arrows_point_down(name):
    if name == "ringmark":
        return  # the face names everything for type checkers and imports nothing
    if room(name) in ("ringmark.data", "ringmark.inversion"):
        assert inside(name) <= {room(name), "ringmark.errors"}
    assert not {r for r in inside(name) - {room(name)} if ROOMS[r] >= ROOMS[room(name)]}


def asked_for(tree: ast.Module) -> set[str]:
    """Strings that something is compared with, matched against or looked up by."""
    tests = [node for node in ast.walk(tree) if isinstance(node, (ast.Compare, ast.MatchValue, ast.Subscript))]
    parts = [part for node in tests for part in ast.walk(node.slice if isinstance(node, ast.Subscript) else node)]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


OUTSIDE = sorted(name for name in FILES if room(name) != "ringmark.watermark.schemes")


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_scheme_is_asked_for_by_name(name):
    parameters = [p for entry in REGISTRY.values() for p in entry.parameters]
    names = {*REGISTRY, *(p.name for p in parameters), *(choice for p in parameters for choice in p.choices)}
    assert {"tree-ring", "pattern", "rand"} <= names and not asked_for(TREES[name]) & names


# `statistics` exports functions of these names.
@pytest.mark.parametrize("name", [name for name in OUTSIDE if name != "ringmark.watermark.statistics"])
def test_no_published_statistic_is_named(name):
    names = {text for statistic in published_statistics().values() for text in (statistic.name, statistic.label)}
    texts = {node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)}
    assert "published_distance" in names and not texts & names


def test_schemes_are_reached_through_their_registry():
    schemes = set(FILES) - set(OUTSIDE) - {"ringmark.watermark.schemes", "ringmark.watermark.schemes.base"}
    assert len(schemes) > 1 and not [name for name in OUTSIDE if EVER[name] & schemes]


def test_one_adapter():
    users = {name for name, modules in EVER.items() if {"diffusers", "transformers"} & {top(m) for m in modules}}
    assert users and all(name.startswith("ringmark.inversion.models") for name in users)


def test_the_command_line_is_imported_by_nobody():
    assert not [name for name, modules in EVER.items() if "ringmark.watermark.cli" in modules]


def test_no_cycles():
    graph = {name: modules & set(FILES) for name, modules in AT_ONCE.items() if name != "ringmark"}
    # Importing a module imports the packages that it is in.
    for name, modules in graph.items():
        modules |= {parent for m in modules if (parent := m.rpartition(".")[0]) in graph and parent != name}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled_or_evaluated(name):
    modules = EVER[name]
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & {top(m) for m in modules}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Name):
            assert node.id not in ("eval", "exec"), f"{name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), f"{name}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "load" not in {alias.name for alias in node.names}, f"{name}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{name}:{node.value.lineno}"


@pytest.mark.parametrize("name", sorted(set(FILES)))
def test_a_library_does_not_print(name):
    assert not [n.lineno for n in ast.walk(TREES[name]) if isinstance(n, ast.Name) and n.id == "print"]


def test_help_imports_nothing_heavy():
    script = """
import sys
import ringmark, ringmark.errors
from ringmark.watermark.cli.main import main
for command in ([], *([name] for name in main.commands)):
    try:
        main([*command, "--help"])
    except SystemExit as done:
        assert not done.code, command
heavy = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "pandas", "PIL", "diffusers", "transformers"}
heavy |= {"safetensors", "pydantic"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") > 5
