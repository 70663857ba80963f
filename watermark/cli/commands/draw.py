"""Draw images."""

from __future__ import annotations

from pathlib import Path

import click

from ringmark.errors import counted
from ringmark.watermark.cli.options import (
    PATH,
    ModelOptions,
    batch_option,
    force_option,
    guidance_option,
    json_option,
    model_options,
    say,
    seed_option,
    steps_option,
)


@click.command()
@click.option("-o", "--output", type=PATH, required=True, help="The folder to draw into.")
@click.option("--key", "key_path", type=PATH, help="Mark the images with this key.")
@click.option("--no-mark", is_flag=True, help="Draw unmarked images.")
@click.option("-n", "--number", type=click.IntRange(1), help="Number of images.  [default: one for each prompt]")
@click.option(
    "--prompt", "prompts", multiple=True, help="A prompt; may be repeated.  [default: captions of procedural scenes]"
)
@seed_option
@guidance_option
@steps_option
@batch_option
@force_option
@model_options
@json_option
def generate(
    output: Path,
    key_path: Path | None,
    no_mark: bool,
    number: int | None,
    prompts: tuple[str, ...],
    seed: int,
    guidance: float,
    steps: int,
    batch: int,
    force: bool,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Draw marked or unmarked images.

    Images are named by their seeds, and labels.csv lists them. Run the same command again to resume an interrupted run.

    \b
    Example:
      ringmark generate --key my.key --prompt "lake at sunset with snowy mountains" -n 4 -o marked
    """
    from ringmark.watermark.keys.key import Key
    from ringmark.watermark.tasks.draw import draw, prompts_for

    if bool(key_path) == no_mark:
        raise click.UsageError("give either --key KEY to mark the images or --no-mark")
    key = Key.load(key_path) if key_path else None
    texts = prompts_for(list(prompts), number or max(1, len(prompts)), seed)
    paths = draw(
        model.load(text=True), output, texts, seed, key=key, steps=steps, guidance=guidance, batch=batch, force=force
    )
    records = [{"path": str(path), "prompt": text} for path, text in zip(paths, texts, strict=True)]
    say(records, f"{counted(len(paths), 'marked image' if key else 'unmarked image')} in {output}", as_json)
