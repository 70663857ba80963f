"""Every error code that the library raises has a remedy, and every remedy a code; the library names no option."""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

from ringmark import errors
from ringmark.errors import KeyFileError, RingmarkError
from ringmark.watermark.cli.remedies import REMEDIES, explained, explained_system_error

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"[a-z]+\.[a-z0-9]+(-[a-z0-9]+)*")
ERRORS = {name for name in errors.__all__ if name.endswith("Error")}
LIBRARY = [
    path
    for room in ("ringmark", "inversion", "watermark", "data")
    for path in sorted((ROOT / room).rglob("*.py"))
    if (ROOT / "watermark" / "cli") not in path.parents
]
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in LIBRARY}


def raised(tree: ast.Module) -> Iterator[ast.Call]:
    """The calls that make one of the library's errors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
            yield node


def texts(node: ast.AST) -> Iterator[str]:
    """The string constants in a piece of code."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def is_room(node: ast.AST) -> bool:
    """Whether this is an argument room="…"."""
    return isinstance(node, ast.keyword) and node.arg == "room" and isinstance(node.value, ast.Constant)


def default_rooms(tree: ast.Module) -> Iterator[str]:
    """Defaults of parameters called room."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            last = zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)
            pairs = [*last, *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
            yield from (value.value for arg, value in pairs if arg.arg == "room" and isinstance(value, ast.Constant))


def codes(call: ast.Call) -> set[str]:
    """The codes that a call gives; a conditional expression gives several."""
    return {text for text in texts(call.args[0]) if CODE.fullmatch(text)} if call.args else set()


CALLS = [(name, call) for name, tree in TREES.items() for call in raised(tree)]
CODES = {code: name for name, call in CALLS for code in codes(call)}
ROOMS = {keyword.value.value for tree in TREES.values() for keyword in ast.walk(tree) if is_room(keyword)}
ROOMS |= {room for tree in TREES.values() for room in default_rooms(tree)}
"""Rooms whose codes are made where a file is opened: f"{room}.missing", and so on."""
CONSTANTS = {text for tree in TREES.values() for text in texts(tree)}
CONSTANTS |= {room + text for room in ROOMS for text in CONSTANTS if text.startswith(".")}


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_has_a_remedy(code: str) -> None:
    assert REMEDIES.get(code), f"{CODES[code]} raises {code}: say what to do in watermark/cli/remedies.py"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_every_error_has_the_details_that_its_remedies_name(call: tuple[str, ast.Call]) -> None:
    given = {keyword.arg for keyword in call[1].keywords}
    if None not in given:  # **details
        for code in codes(call[1]):
            named = {field for _, field, _, _ in Formatter().parse(REMEDIES[code]) if field}
            assert named <= given | {"quoted", "subject"}, f"{code} lacks {named - given}"


@pytest.mark.parametrize("code", sorted(REMEDIES))
def test_every_remedy_has_a_code(code: str) -> None:
    assert CODE.fullmatch(code) and code in CONSTANTS, f"nothing raises {code}"
    assert not REMEDIES[code].endswith(".")


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_error_of_the_library_names_an_option(name: str) -> None:
    for call in raised(TREES[name]):
        assert not [text for text in texts(call) if "--" in text], f"{name}:{call.lineno}"


def test_a_remedy_follows_the_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REMEDIES, "key.mode", "run: chmod 600 {quoted}; {count} more")
    error = KeyFileError("key.mode", "others may read it", subject="a b\n.key", count=2)
    assert explained(error) == r"a b\n.key: others may read it; run: chmod 600 'a b\n.key'; 2 more"
    assert explained(RingmarkError("none.such", "no remedy is known")) == "no remedy is known"


def test_a_full_disk_is_mended_by_making_room() -> None:
    full, missing = (OSError(number, os.strerror(number), "a.png") for number in (errno.ENOSPC, errno.ENOENT))
    assert explained_system_error(full) == f"a.png: {os.strerror(errno.ENOSPC)}; make room on the disk"
    assert "choose another" in explained_system_error(missing)
