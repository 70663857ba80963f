"""The command line as a whole: help, errors, exit codes, pipes."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from shell import ROOT, pictures, refused, run

from ringmark.watermark.cli import main as cli
from ringmark.watermark.cli.options import EXIT_PIPE, uncollected
from ringmark.watermark.cli.remedies import REMEDIES
from ringmark.watermark.tasks import draw as drawing
from ringmark.watermark.tasks import info as facts
from ringmark.watermark.tasks import load

OWN_WORDS = (
    *("output", "key_paths", "key_path", "number", "calibration", "plot", "explain", "seed", "size", "labels"),
    *("steps", "batch"),
)
"""Options whose meaning depends on the command."""


def leaves(group: click.Group, *path: str) -> dict[str, click.Command]:
    """Every command by its full name."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        below = leaves(command, *path, name) if isinstance(command, click.Group) else {}
        found |= below or {" ".join((*path, name)): command}
    return found


COMMANDS = leaves(cli.main)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def params_of(command: click.Command) -> list[click.Parameter]:
    """The parameters of a command; those of keygen depend on the schemes that are registered."""
    return command.get_params(click.Context(command))


def context_of(args: list[str]) -> click.Context:
    """The context of the command that these arguments call, parsed and not run."""
    ctx, command, name = click.Context(cli.main, info_name="ringmark"), cli.main, "ringmark"
    while True:
        ctx = command.make_context(name, list(args), parent=ctx)
        if not isinstance(command, click.Group):
            return ctx
        name, command, args = command.resolve_command(ctx, [*getattr(ctx, "_protected_args", []), *ctx.args])


def code_lines(text: str) -> Iterator[str]:
    """The lines of a page's code blocks, fenced or indented."""
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ")


def command_lines(text: str) -> list[str]:
    """The ringmark commands in the code blocks of a page, without the shell's part of the line."""
    return [re.split(r"\s(?:#|\||>|&&|;)", line)[0] for line in code_lines(text) if line.startswith("ringmark ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documentation_parse(page: Path) -> None:
    for line in command_lines(page.read_text(encoding="utf-8")):
        args = [arg for arg in shlex.split(line)[1:] if arg not in ("...", "…")]
        try:
            context_of(args)
        except click.exceptions.Exit:
            pass  # --help, --list
        except click.ClickException as error:
            raise AssertionError(f"{line}: {error.format_message()}") from error


def test_commands_are_found_in_the_documentation() -> None:
    found = [line for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"))]
    assert len(found) > 20 and {line.split()[1] for line in found} <= set(cli.main.commands)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_example_that_parses_and_is_documented(name: str) -> None:
    text = re.sub(r"\n +", "\n  ", COMMANDS[name].help or "")
    _, _, examples = text.partition("Example:\n")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert lines and all(line.startswith(f"ringmark {name} ") for line in lines)
    for line in lines:
        context_of(shlex.split(line)[1:])
    assert any(f"ringmark {name}" in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"demo", "serve"}))
def test_programs_may_read_what_a_command_says(name: str) -> None:
    assert "as_json" in {param.name for param in params_of(COMMANDS[name])}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_what_writes_a_file_replaces_none_unasked(name: str) -> None:
    params = {param.name for param in params_of(COMMANDS[name])}
    if name not in ("audit", "reaudit") and params & {"output", "plot", "explain"}:
        assert "force" in params


def test_same_words_for_the_same_options() -> None:
    shared: dict[str, set[object]] = {}
    for command in COMMANDS.values():
        for option in params_of(command):
            if isinstance(option, click.Option) and option.name not in OWN_WORDS and "--help" not in option.opts:
                shared.setdefault(str(option.name), set()).add((option.help, str(option.default), tuple(option.opts)))
    assert not {name: texts for name, texts in shared.items() if len(texts) > 1}


def test_remedies_name_options_that_exist() -> None:
    known = {option for command in COMMANDS.values() for param in params_of(command) for option in param.opts}
    for code, remedy in REMEDIES.items():
        assert set(re.findall(r"--[a-z][a-z-]*", remedy)) <= known, code


def test_folders_and_models_that_are_not(house: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    args = ["--key", house / "my.key", "-o", tmp_path / "r.jsonl"]
    assert "empty" in refused("audit", tmp_path / "empty", *args)
    assert "none" in refused("audit", tmp_path / "none", *args)
    assert not (tmp_path / "r.jsonl").exists()
    assert "no model_index.json" in refused("info", "--model", tmp_path / "empty")
    assert "--device" in refused("info", "--device", "warp")
    before = pictures(house)[0].read_bytes()
    explain = ["verify", pictures(house)[0], *args[:2], "--explain", pictures(house)[0]]
    assert "exists already" in refused(*explain) and "exists already" in refused(*explain, "--force")
    assert pictures(house)[0].read_bytes() == before


def test_a_refusal_does_not_cost_a_model(house: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load, "load_model", refuse)
    picture, key, none = pictures(house)[0], ["--key", house / "my.key"], tmp_path / "none"
    assert "exists already" in refused("keygen", "-o", house / "my.key")
    assert "exists already" in refused("invert", picture, "-o", picture)
    for option in (["verify", picture, *key, "--alpha"], ["generate", "--no-mark", "-o", none, "--guidance"]):
        assert "nan is not a finite number" in refused(*option, "nan")
    assert "no such file" in refused("verify", picture, "--key", none)
    assert "no *.key file" in refused("verify", picture, "--key", tmp_path)
    assert "is a folder" in refused("generate", "--key", tmp_path, "-o", tmp_path / "out")
    assert "is not a folder" in refused("keygen", "-n", 2, "-o", house / "my.key")
    assert "with -n" in refused("keygen", "-o", tmp_path)
    assert "does not exist" in refused("audit", none, *key, "-o", tmp_path / "r.jsonl")
    assert "no such folder" in refused("evaluate", *key, "--marked", none, "-o", tmp_path / "out")
    assert "known ones are" in refused("evaluate", "--methods", "magic", "-o", tmp_path / "out")
    assert "unknown attack" in refused("evaluate", "--attacks", "magic", "-o", tmp_path / "out")
    assert "same key" in refused("evaluate", *key, *key, "-o", tmp_path / "out")
    assert ".png or .svg" in refused("verify", picture, *key, "--explain", "why.txt")
    assert ".png or .svg" in refused("roc", none, "--labels", none, "-o", "roc.pdf")
    assert "the name is empty" in refused("verify", "", *key)
    assert "the name is empty" in refused("keygen", "-o", "")
    assert "--seed" in refused("generate", "--no-mark", "--seed", 2**64, "-o", tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there() -> None:
    assert "device cuda: cannot be used" in refused("info", "--device", "cuda")


def test_no_fault_of_ours_looks_like_a_verdict(monkeypatch) -> None:
    def fail(*_):
        raise TypeError("a fault of ours")

    monkeypatch.setattr(facts, "facts", fail)
    assert "TypeError: a fault of ours" in run("info", code=2).stderr


def test_a_full_disk_wants_room_and_not_another_name(tmp_path: Path, monkeypatch) -> None:
    def fail(number: int):
        def draw(*_, **__):
            raise OSError(number, os.strerror(number), str(tmp_path / "0.png"))

        monkeypatch.setattr(drawing, "draw", draw)
        return refused("generate", "--no-mark", "-o", tmp_path)

    assert "make room" in fail(errno.ENOSPC) and str(tmp_path / "0.png") in fail(errno.ENOSPC)
    assert "choose another" in fail(errno.EISDIR)


def test_only_what_is_resumed_says_so_when_interrupted(tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(facts, "facts", interrupt)
    monkeypatch.setattr(drawing, "draw", interrupt)
    assert run("info", code=130).stderr == "interrupted\n"
    assert "same command again" in run("generate", "--no-mark", "-o", tmp_path, code=130).stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pipes of another kind")
@pytest.mark.parametrize(("args", "closed"), [(["--help"], 1), (["info"], 1), (["keygen"], 2)])
def test_a_closed_pipe_ends_it_quietly(args: list[str], closed: int) -> None:
    command = [sys.executable, "-m", "ringmark.watermark.cli", *args]
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {("stdout", "stderr")[closed - 1]: write}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, env=buffered, **streams)
    os.close(write)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (EXIT_PIPE, b"", b"")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(encoding: str) -> None:
    call = [sys.executable, "-m", "ringmark.watermark.cli", "attack", "--list"]
    done = subprocess.run(
        call, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True, cwd=ROOT
    )
    assert rb"\u03c3" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--bands", f"2-{10**20} in 0"),
        ("--radii", f"2-{10**20}"),
        ("--channels", f"0-{10**20}"),
        ("--radii", "9" * 5000),
    ],
)
def test_huge_numbers_are_refused(option: tuple[str, str], tmp_path: Path) -> None:
    assert "Error: " in refused("keygen", *option, "-o", tmp_path / "a.key")


@pytest.mark.parametrize("size", ["9" * 5000 + "x1", f"1x{10**12}", "0x8", "٣x٣"])
def test_sizes_that_make_no_sense_are_refused(size: str, tmp_path: Path) -> None:
    message = refused("verify", tmp_path, "--key", tmp_path, "--size", size)
    assert "is not a size" in message and len(message) < 500


def test_every_decoder_inversion_is_offered_by_name() -> None:
    from ringmark.inversion.decoder import INVERTERS

    for command in (cli.verify, cli.audit, cli.invert, cli.calibrate):
        (option,) = (p for p in command.params if p.name == "method")
        assert set(option.type.choices) == set(INVERTERS), command.name


def test_the_default_steps_are_those_of_the_library() -> None:
    from ringmark.inversion.recover import STEPS

    for command in (cli.verify, cli.audit, cli.calibrate, cli.evaluate):
        (option,) = (p for p in command.params if p.name == "steps")
        assert option.default == STEPS, command.name


def test_what_is_loaded_is_never_searched_for_garbage() -> None:
    before = gc.get_freeze_count()
    try:
        with pytest.raises(ZeroDivisionError), uncollected():
            assert not gc.isenabled()
            1 / 0  # noqa: B018
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_the_log_goes_to_stderr_and_holds_no_key(house: Path) -> None:
    result = run("-v", "verify", pictures(house)[0], "--key", house / "my.key", "--steps", 4, "--max-steps", 1)
    lines = result.stderr.splitlines()
    assert any(re.match(r"\d{4}-\d\d-\d\d \S+ INFO ringmark\.\S+: ", line) for line in lines)
    assert not logging.getLogger("ringmark").handlers
    assert "INFO" not in run("info").stderr


def test_json_nested_too_deeply_is_not_blamed_on_the_device(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data" / "pocket", model)
    (model / "unet" / "config.json").write_text("[" * 100_000)
    message = refused("info", "--model", model)
    assert "--device" not in message and str(model) in message
