"""The arrows between modules point one way; nothing heavy or dangerous is imported where it need not be."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("inversion", "watermark", "data")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
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


def top(name: str) -> str:
    return name.partition(".")[0]


def layer(name: str) -> int:
    """0: inversion; 1: errors, keys, statistics and schemes; 2: what is done with them; 3: the commands."""
    if top(name) == "inversion":
        return 0
    module = name.split(".")[1] if "." in name else "errors"  # the package itself is as low as its errors
    return {"cli": 3, "errors": 1, "keys": 1, "statistics": 1, "schemes": 1}.get(module, 2)


def test_the_files_are_found():
    assert {"inversion.model", "watermark.cli", "watermark.schemes.tree_ring", "data.store"} <= set(FILES)
    assert EVER["watermark.detect"] >= {"inversion.model", "watermark.keys", "data.images"}
    assert "data.images" in EVER["watermark.detect"] and "torch" in AT_ONCE["inversion.model"]
    assert "watermark.runs" in EVER["watermark.cli"] and "watermark.runs" not in AT_ONCE["watermark.cli"]


@pytest.mark.parametrize(
    "package, strangers", [("inversion", {"watermark", "data"}), ("data", {"watermark", "inversion"})]
)
def test_packages_that_know_nothing_of_others(package, strangers):
    for name, modules in EVER.items():
        if top(name) == package:
            assert not strangers & {top(m) for m in modules}, name


def test_one_adapter():
    users = {name for name, modules in EVER.items() if {"diffusers", "transformers"} & {top(m) for m in modules}}
    assert users == {"inversion.model"}


def test_arrows_within_the_watermark_point_down():
    for name, modules in EVER.items():
        if top(name) != "watermark":
            continue
        for module in modules:
            if top(module) in ("watermark", "inversion"):
                assert layer(module) <= layer(name), f"{name} imports {module}"
            # Anything may write files; what to do with images is for the upper layers.
            assert top(module) != "data" or module == "data.store" or layer(name) >= 2, f"{name} imports {module}"


def test_the_command_line_is_imported_by_nobody():
    assert not [name for name, modules in EVER.items() if "watermark.cli" in modules]


def test_no_cycles():
    graph = {name: modules & set(FILES) for name, modules in AT_ONCE.items()}
    # Importing a module imports the packages that it is in.
    for modules in graph.values():
        modules |= {parent for m in modules if (parent := m.rpartition(".")[0]) in FILES}
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


@pytest.mark.parametrize("name", sorted(set(FILES) - {"watermark.cli"}))
def test_a_library_does_not_print(name):
    assert not [n.lineno for n in ast.walk(TREES[name]) if isinstance(n, ast.Name) and n.id == "print"]


def test_help_imports_nothing_heavy():
    script = """
import sys
import data, inversion, watermark, watermark.cli, watermark.errors
for command in ([], *([name] for name in watermark.cli.main.commands)):
    try:
        watermark.cli.main([*command, "--help"])
    except SystemExit as done:
        assert not done.code, command
heavy = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "diffusers", "transformers", "safetensors"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") > 5
