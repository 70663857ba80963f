"""The documentation says what is true: its code runs, its commands exist, its links lead somewhere, the site builds."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from families import build
from safetensors.torch import save_file

import ringmark
from ringmark.watermark.cli.main import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "measurements" / "results"
CARDS = [ROOT / "data" / model / "README.md" for model in ("pocket", "pocket_flow")]
PAGES = sorted(
    [*(p for s in ("md", "rst") for p in DOCS.rglob(f"*.{s}") if "_build" not in p.parts), *ROOT.glob("*.md"), *CARDS]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    """The blocks of Python in a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def indented_lines(text: str) -> Iterator[str]:
    """Lines of indented code, with continued lines joined and comments and prompts left out."""
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for line in code.replace("\\\n", " ").splitlines():
        yield line.removeprefix("$ ").partition(" #")[0].strip()


def command_lines(page: Path) -> Iterator[list[str]]:
    """Every command line of ringmark in a page: indented code, and inline code with arguments."""
    text = page.read_text(encoding="utf-8")
    inline = (" ".join(code.split()) for code in re.findall(r"`(ringmark [^`]+)`", text))
    for line in (*indented_lines(text), *inline):
        if line.startswith("ringmark ") and "…" not in line:
            yield shlex.split(line.partition(" && ")[0])[1:]


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unknown_options(words: list[str]) -> list[str]:
    """Options in a command line that its command does not have."""
    command, words = main, [word for word in words if word != "|"]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    known = {"-h", "--help", "--version"} | {
        o for p in command.get_params(click.Context(command)) for o in (*p.opts, *p.secondary_opts)
    }
    return [word for word in words if re.match(r"-{1,2}[a-z]", word) and word.partition("=")[0] not in known]


def test_the_python_of_the_readme_verifies_a_picture(tmp_path, monkeypatch, capsys):
    prepare_picture(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks(ROOT / "README.md")[0], "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "carries key" in lines[0] and "p = " in lines[0]


def prepare_picture(folder: Path) -> None:
    """What the Python of the pages needs: a key, a picture that carries it, and a folder of others."""
    runner = CliRunner()
    key, drawn = str(folder / "my.key"), folder / "pictures"
    assert runner.invoke(main, ["keygen", "-o", key]).exit_code == 0
    assert runner.invoke(main, ["generate", "--key", key, "-n", "2", "--steps", "5", "-o", str(drawn)]).exit_code == 0
    min(drawn.glob("*.png")).rename(folder / "picture.png")


@pytest.mark.slow
def test_the_python_of_the_library_page_runs(tmp_path, monkeypatch):
    prepare_picture(tmp_path)
    monkeypatch.chdir(tmp_path)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    names = {"images": images, "encode": lambda x: x[:, :1] / 2, "decode": lambda z: z.expand(-1, 3, -1, -1)}
    for block in python_blocks(DOCS / "howto" / "library.md"):
        exec(compile(block, "library.md", "exec"), names)
    assert names["noise"].shape == (1, 4, 32, 32)
    assert len(names["latents"]) == 1
    assert names["counts"].images == 1


@pytest.mark.slow
def test_the_queries_of_the_page_on_scale_find_the_marked_picture(tmp_path, monkeypatch, capsys):
    duckdb = pytest.importorskip("duckdb")
    prepare_picture(tmp_path)
    monkeypatch.chdir(tmp_path)
    args = ["audit", "pictures", "--key", "my.key", "-o", "results.parquet", "--method", "encoder", "--steps", "1"]
    assert CliRunner().invoke(main, [*args, "--keep-noise"]).exit_code == 0
    args = ["reaudit", "results.parquet", "--key", "my.key", "-o", "again.parquet", "--table", "keys.parquet"]
    assert CliRunner().invoke(main, args).exit_code == 0
    text = (DOCS / "howto" / "scale.md").read_text(encoding="utf-8")
    of_table, of_results = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    [(name, _, log10_p)] = duckdb.sql(of_results).fetchall()
    assert (tmp_path / "pictures" / name).exists() and log10_p < -3
    [(_, images, _)] = duckdb.sql(of_table).fetchall()
    assert images == 1
    names: dict[str, Any] = {}
    for block in python_blocks(DOCS / "howto" / "scale.md"):
        exec(compile(block, "scale.md", "exec"), names)
    assert names["marked"] == 1 and "key" in capsys.readouterr().out


def from_pipe_to_verdict(pipe: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the first block of the page on marking with this pipeline; what it defines."""
    monkeypatch.chdir(folder)
    block, names = python_blocks(DOCS / "howto" / "mark.md")[0], {"pipe": pipe}
    assert len([line for line in block.splitlines() if line]) == 8
    exec(compile(block, "mark.md", "exec"), names)
    return names


@pytest.mark.slow
def test_eight_lines_lead_from_ones_own_pipeline_to_a_verdict(pocket, tmp_path, monkeypatch, capsys):
    names = from_pipe_to_verdict(copy.copy(pocket.pipe), tmp_path, monkeypatch)
    assert names["verdict"].present and "carries key" in capsys.readouterr().out
    assert ringmark.Key.load(tmp_path / "my.key").fingerprint == names["key"].fingerprint


def test_the_same_lines_run_on_a_tiny_flux(tmp_path, monkeypatch):
    """Its network and autoencoder are random, so the mark is not recovered from pixels."""
    pipe = build("flux.1-schnell")
    pipe.default_sample_size = 16
    names = from_pipe_to_verdict(pipe, tmp_path, monkeypatch)
    assert names["image"].size == (128, 128) and 0 < names["verdict"].p_value <= 1
    assert names["key"].metadata["kind"] == {"family": "flux.1", "channels": 16, "factor": 8}


def test_the_node_for_comfyui_hands_out_the_noise_of_the_file(tmp_path):
    """The noises from `first` on, as many as the batch of the latent image has and of its shape."""
    noise, path = torch.randn(4, 16, 6, 8), str(tmp_path / "noise.safetensors")
    save_file({"noise": noise}, path)
    names: dict[str, Any] = {}
    exec(compile(python_blocks(DOCS / "howto" / "mark.md")[-1], "mark.md", "exec"), names)
    [drawn] = names["NODE_CLASS_MAPPINGS"]["MarkedNoise"]().load(path, 1)
    assert torch.equal(drawn.generate_noise({"samples": torch.zeros(2, 16, 6, 8)}), noise[1:3])


def test_the_readme_is_short_and_starts_with_what_matters():
    assert len(README.split()) <= 700
    first_screen = README.splitlines()[:40]
    for needed in ("docs/images/explain.png", "pip install", "ringmark keygen", "ringmark generate", "ringmark verify"):
        assert any(needed in line for line in first_screen), needed
    [block] = python_blocks(ROOT / "README.md")
    assert block.strip() in "\n".join(first_screen)
    assert len([line for line in block.splitlines() if line]) <= 6


@pytest.mark.parametrize("command", ["bash scripts/demo.sh", "bash scripts/test.sh"])
def test_the_readme_has_both_commands(command):
    assert command in README


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, fragment = link.partition("#")
        if re.match(r"https?:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_stays_within_the_line(page):
    table, link = "|", re.compile(r"^!?\[[^]]*\]\([^)]*\)$")
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if len(line) > 120 and not line.startswith((table, "    ")) and not link.match(line)]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    for words in command_lines(page):
        assert not unknown_options(words), words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_experiments_exist(page):
    for name in re.findall(r"python -m scripts\.experiments ([a-z_]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / "scripts" / "experiments" / f"{name}.py").exists(), name


def test_every_result_is_quoted():
    quoted = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in DOCS.rglob("*.md")
        for link in LINK.findall(page.read_text(encoding="utf-8"))
    }
    assert not [file.name for file in RESULTS.iterdir() if file not in quoted]


def test_every_page_is_in_the_index():
    listed = set(re.findall(r"^[\w/-]+$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in PAGES if DOCS in p.parents}
    assert pages == listed | {"index"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the docs extra")
def test_the_site_builds_without_warnings(tmp_path):
    built = tmp_path / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, str(DOCS), str(built)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    pages = {p.relative_to(built): p.read_text(encoding="utf-8") for p in built.rglob("*.html")}
    assert 'id="ringmark-keys-export-public"' in pages[Path("reference/commands.html")]
    assert "invert_decoder" in pages[Path("reference/inversion.html")]
    assert "Key" in pages[Path("reference/ringmark.html")]
    missing = [
        (page, link)
        for page, text in pages.items()
        for link in re.findall(r'(?:href|src)="([^"#:?]+)[^":]*"', text)
        if not (built / page.parent / link).exists()
    ]
    assert not missing
