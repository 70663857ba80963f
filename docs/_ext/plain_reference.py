"""The reference pages, from the code: modules of a room, help texts of the commands, codes of errors.

Docstrings and help texts are plain prose, not reStructuredText. `as_rst` turns them into reStructuredText that says the
same, so that a star or an underscore in a docstring never breaks the build.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.util.nodes import nested_parse_with_titles

CODE = re.compile(r"``?([^`]+)``?|(?<![\w-])(--[a-z][\w-]+)")
SECTIONS = {"Args:": "Arguments", "Attributes:": "Attributes", "Example:": "Example", "Examples:": "Examples"}
SECTIONS |= {"Raises:": "Raises", "Returns:": "Returns", "Yields:": "Yields"}
LONGEST_VALUE = 80
BULLET = re.compile(r"(?:[-*•]|\d+\.) ")


def escaped(line: str) -> str:
    """A line of prose as reStructuredText; options and what is between backticks become literals."""
    rst, end = "", 0
    for code in CODE.finditer(line):
        rst += prose(line[end : code.start()]) + f"\\ ``{(code[1] or code[2]).strip()}``\\ "
        end = code.end()
    return (rst + prose(line[end:])).strip()


def prose(text: str) -> str:
    """Text without markup."""
    return re.sub(r"([*_|\\`])", r"\\\1", text)


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Lines between blank lines, and within them runs that are indented or not."""
    block: list[str] = []
    for line in lines:
        if block and (not line.strip() or line.startswith(" ") != block[-1].startswith(" ")):
            yield block
            block = []
        if line.strip():
            block.append(line.rstrip())
    if block:
        yield block


def fields(block: list[str]) -> Iterator[str]:
    """ "name: description" under a heading as bullets; what is indented further goes on."""
    indent = min(len(line) - len(line.lstrip()) for line in block)
    for line in block:
        name, colon, text = line.strip().partition(":")
        if line[indent] == " ":
            yield f"  {escaped(line.strip())}"
        elif colon:
            yield f"- ``{name}``: {escaped(text.strip())}"
        else:
            yield f"- {escaped(line.strip())}"


def as_rst(lines: list[str]) -> list[str]:
    """Plain prose as reStructuredText: paragraphs, lists, sections of fields, and indented blocks as they are."""
    rst: list[str] = []
    listed = False
    section = ""
    for block in blocks(lines):
        indented = block[0].startswith(" ")
        if block == [block[0]] and block[0] in SECTIONS:
            section = block[0]
            rst += [f"**{SECTIONS[section]}**", ""]
        elif indented and section and "Example" not in section:
            rst += [*fields(block), ""]
        elif indented and listed:  # the rest of a bullet
            rst[-1:] = [*(f"  {escaped(line.strip())}" for line in block), ""]
        elif indented:
            language = "pycon" if block[0].lstrip().startswith(">>>") else "text"
            rst += [f".. code-block:: {language}", "", *(f"    {line.strip()}" for line in block), ""]
        else:
            listed, section = bool(BULLET.match(block[0])), ""
            rst += [*(f"- {escaped(line[2:])}" if BULLET.match(line) else escaped(line) for line in block), ""]
    return rst


def plain_docstring(app, what, name, obj, options, lines) -> None:
    lines[:] = as_rst(lines)


def plain_description(app, ctx, lines) -> None:
    """sphinx-click marks what keeps its line breaks with a bar."""
    lines[:] = as_rst([re.sub(r"^\| ?", "", line) for line in lines])


def plain_options(app, ctx, lines) -> None:
    lines[:] = [f"   {escaped(line.strip())}" if re.match(r"   [^:.\s]", line) else line for line in lines]


def without_long_value(app, domain, objtype, content) -> None:
    """Drop a constant's value where it would fill the page."""
    if objtype == "data":
        for value in list(content.parent.findall(addnodes.desc_annotation)):
            if "=" in value.astext() and len(value.astext()) > LONGEST_VALUE:
                value.parent.remove(value)


class Room(Directive):
    """``.. room:: ringmark.inversion``: every public module of a package, from its docstrings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = importlib.import_module(self.arguments[0])
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        text: list[str] = []
        for name in sorted(m.name for m in found if not m.ispkg and ".cli." not in m.name):
            if getattr(importlib.import_module(name), "__all__", None):
                text += [name, "-" * len(name), "", f".. automodule:: {name}", "   :members:", ""]
        return parsed(self, text)


class Face(Directive):
    """``.. face:: ringmark``: what a package exports, functions first, errors left out."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = importlib.import_module(self.arguments[0])
        exported = {name: getattr(package, name) for name in package.__all__}
        types = {name for name, thing in exported.items() if isinstance(thing, type)}
        errors = {name for name in types if issubclass(exported[name], Exception)}
        text = ["Functions", "---------", ""]
        for name in sorted(exported.keys() - types):
            text += [f".. autofunction:: {package.__name__}.{name}", "   :no-index:", ""]
        text += ["Types", "-----", ""]
        for name in sorted(types - errors):
            text += [f".. autoclass:: {package.__name__}.{name}", "   :members:", "   :no-index:", ""]
        return parsed(self, text)


class ErrorCodes(Directive):
    """``.. error-codes::``: a table of every code and its remedy."""

    def run(self) -> list[nodes.Node]:
        try:
            remedies = importlib.import_module("ringmark.watermark.cli.remedies").REMEDIES
        except ImportError:
            remedies = {}
        text = [".. list-table::", "   :header-rows: 1", "", "   * - code", "     - what to do"]
        for code, remedy in sorted(remedies.items()):
            text += [f"   * - ``{code}``", f"     - {escaped(remedy)}"]
        return parsed(self, [*text, ""])


def parsed(directive: Directive, text: list[str]) -> list[nodes.Node]:
    section = nodes.section()
    section.document = directive.state.document
    nested_parse_with_titles(directive.state, StringList(text, source=directive.name), section)
    return section.children


def setup(app) -> dict[str, bool]:
    app.add_directive("room", Room)
    app.add_directive("face", Face)
    app.add_directive("error-codes", ErrorCodes)
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("sphinx-click-process-description", plain_description)
    app.connect("sphinx-click-process-options", plain_options)
    app.connect("object-description-transform", without_long_value)
    return {"parallel_read_safe": True}
