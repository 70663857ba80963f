"""Draw images; write noise for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from ringmark.errors import counted
from ringmark.inversion.models.samplers import SAMPLERS
from ringmark.watermark.cli.options import (
    PATH,
    FilePath,
    ModelOptions,
    Size,
    batch_option,
    force_option,
    guidance_option,
    json_option,
    model_options,
    say,
    seed_option,
    size_option,
)


@click.command()
@click.option("-o", "--output", type=PATH, required=True, help="Folder for the images.")
@click.option("--key", "key_path", type=PATH, help="Mark the images with this key.")
@click.option("--no-mark", is_flag=True, help="Draw unmarked images.")
@click.option("-n", "--number", type=click.IntRange(1, 10**6), help="Number of images.  [default: one for each prompt]")
@click.option(
    "--prompt", "prompts", multiple=True, help="A prompt; may be repeated.  [default: captions of procedural scenes]"
)
@click.option("--negative-prompt", "negative", default="", help="What the images should not show.")
@seed_option
@guidance_option
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="Steps of the sampler.")
@size_option
@click.option(
    "--sampler",
    type=click.Choice(list(SAMPLERS)),
    help="euler-a, dpm++-sde, lcm and ddpm add noise at every step and lose most marks.  [default: the model's own]",
)
@click.option("--lora", "loras", multiple=True, help="A LoRA file, or FILE:SCALE; may be repeated.")
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
    negative: str,
    seed: int,
    guidance: float,
    steps: int,
    size: tuple[int, int] | None,
    sampler: str | None,
    loras: tuple[str, ...],
    batch: int,
    force: bool,
    model: ModelOptions,
    as_json: bool,
) -> None:
    """Draw marked or unmarked images with the model's own pipeline.

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
        model.load(text=True, loras=loras),
        output,
        texts,
        seed,
        key=key,
        steps=steps,
        guidance=guidance,
        size=size,
        sampler=sampler,
        negative=negative,
        loras=loras,
        batch=batch,
        force=force,
    )
    records = [{"path": str(path), "prompt": text} for path, text in zip(paths, texts, strict=True)]
    say(records, f"{counted(len(paths), 'marked image' if key else 'unmarked image')} in {output}", as_json)


@click.command()
@click.option("-o", "--output", type=FilePath(".safetensors"), required=True, help="The file to write.")
@click.option("--key", "key_path", type=PATH, required=True, help="The key to embed.")
@click.option(
    "-n", "--number", type=click.IntRange(1, 10**4), default=1, show_default=True, help="Number of noise samples."
)
@click.option("--size", type=Size(), help="Size of the images in pixels.  [default: the key's reference size]")
@seed_option
@force_option
@json_option
def noise(
    output: Path, key_path: Path, number: int, size: tuple[int, int] | None, seed: int, force: bool, as_json: bool
) -> None:
    """Write marked initial noise for other tools, such as ComfyUI.

    The file holds the float32 tensor "noise" of shape (N, channels, height, width), in latent pixels. Anyone who has
    the file can read the mark from it: keep it secret. No model is loaded.

    \b
    Example:
      ringmark noise --key my.key --size 1216x832 -n 4 -o noise.safetensors
    """
    from ringmark.watermark.keys.key import Key
    from ringmark.watermark.tasks.noise import write_noise

    shape = write_noise(Key.load(key_path), output, list(range(seed, seed + number)), size=size, force=force)
    text = f"{counted(number, 'marked noise sample')} of shape {'x'.join(map(str, shape))} in {output}. Keep it secret."
    say({"path": str(output), "number": number, "shape": shape}, text, as_json)
