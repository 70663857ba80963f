"""Make, list, show and publish keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringmark.errors import counted
from ringmark.watermark.cli.options import (
    FIGURE,
    PATH,
    FilePath,
    ModelOptions,
    force_option,
    json_option,
    model_options,
    say,
)

if TYPE_CHECKING:
    from ringmark.watermark.schemes.base import Parameter


class SchemeCommand(click.Command):
    """A command with an option for each parameter of the registered schemes."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return [*params[:2], *scheme_options(), *params[2:]]


def scheme_options() -> list[click.Option]:
    """--scheme, and an option for each parameter of a registered scheme."""
    import ringmark.watermark.schemes  # noqa: F401  registers the built-in schemes
    from ringmark.watermark.schemes.base import DEFAULT, REGISTRY

    parameters = {p.name: p for entry in REGISTRY.values() for p in entry.parameters}
    names = sorted(REGISTRY)
    choice = click.Option(
        ["--scheme"],
        type=click.Choice(names),
        default=DEFAULT,
        show_default=True,
        expose_value=True,
        help="How keys mark the noise.",
    )
    return [choice, *(_option(parameter) for parameter in parameters.values())]


def _option(parameter: Parameter) -> click.Option:
    """The option for a parameter of a scheme. None stands for the scheme's default."""
    help_text = parameter.help
    if parameter.default is not None:
        help_text += f"  [default: {parameter.show(parameter.default)}]"
    return click.Option(
        [f"--{parameter.name.replace('_', '-')}", parameter.name],
        type=click.Choice(parameter.choices) if parameter.choices else None,
        callback=partial(_parsed, parse=parameter.parse),
        help=help_text,
    )


def _parsed(
    ctx: click.Context, param: click.Parameter, value: str | None, *, parse: Callable[[str], object]
) -> object | None:
    try:
        return None if value is None else parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(cls=SchemeCommand)
@click.option("-o", "--output", type=PATH, required=True, help="The key file to write; with -n, the folder.")
@click.option(
    "-n",
    "--number",
    type=click.IntRange(1),
    help="Make this many keys in a folder, all distinguishable from each other and from those in it. With --force, the "
    "new keys replace those in the folder, and marks made with these can no longer be found.",
)
@click.option(
    "--calibration",
    type=PATH,
    help="File written by ringmark calibrate, which says where noise is best recovered.  [default: the model's own]",
)
@model_options
@force_option
@json_option
def keygen(
    output: Path,
    number: int | None,
    scheme: str,
    calibration: Path | None,
    model: ModelOptions,
    force: bool,
    as_json: bool,
    **parameters: object,
) -> None:
    """Make one key or a folder of keys from the operating system's random numbers.

    \b
    Example:
      ringmark keygen -o my.key
      ringmark keygen -n 64 -o ring
    """
    from ringmark.data.files import refuse_existing
    from ringmark.errors import KeyFileError
    from ringmark.watermark.calibration import Calibration
    from ringmark.watermark.keys.folder import describe
    from ringmark.watermark.keys.key import COMMON
    from ringmark.watermark.schemes.base import description
    from ringmark.watermark.tasks.keygen import grow, keys_in, new_key, write_key

    old = keys_in(output) if number else {}
    if not (number or force):
        refuse_existing(output, error=KeyFileError, room="key")
    measured = Calibration.load(calibration) if calibration else None
    loaded = model.load()
    chosen = {name: value for name, value in parameters.items() if value is not None}
    make = partial(new_key, loaded, scheme, measured, **chosen)
    if number:
        grown = grow(loaded, output, number, make, old, force=force)
        text = (
            f"{counted(number, 'key')} written to {output}, next to {grown.kept} existing; {grown.drawn_again} "
            "drawn again because they were too close to another. Keep them secret."
        )
        say([{"path": str(path)} | describe(key) for path, key in grown.new.items()], text, as_json)
        return
    key = write_key(output, make, force=force)
    record = {"path": str(output), "fingerprint": key.fingerprint} | key.metadata
    details = ", ".join(f"{name} {value}" for name, value in description(key.metadata, COMMON).items())
    text = f"key {key.fingerprint} written to {output}: {scheme} ({details}) for model {loaded.name}. Keep it secret."
    say(record, text, as_json)


@click.group()
def keys() -> None:
    """List, show and publish keys, never their secrets.

    \b
    Example:
      ringmark keys list ring
      ringmark keys show my.key --plot key.png
      ringmark keys export-public my.key -o my-public.json
    """


@keys.command("list")
@click.argument("paths", metavar="FOLDER|FILE...", type=PATH, nargs=-1, required=True)
@json_option
def keys_list(paths: tuple[Path, ...], as_json: bool) -> None:
    """List key files and the keys in folders, one per line.

    \b
    Example:
      ringmark keys list ring old.key
    """
    from ringmark.watermark.keys.folder import describe, load_ring
    from ringmark.watermark.tasks.keys import listing

    ring = load_ring(paths)
    say([{"path": str(path)} | describe(key) for path, key in ring.items()], listing(ring), as_json)


@keys.command("show")
@click.argument("path", metavar="KEY", type=PATH)
@click.option(
    "--plot",
    type=FIGURE,
    help="Draw the key into this PNG or SVG. The picture reveals the key: keep it secret.",
)
@force_option
@json_option
def keys_show(path: Path, plot: Path | None, force: bool, as_json: bool) -> None:
    """Show what a key is for, its fingerprint and its commitment.

    \b
    Example:
      ringmark keys show my.key
    """
    from ringmark.data.files import refuse_foreign
    from ringmark.watermark.keys.folder import describe
    from ringmark.watermark.keys.key import Key
    from ringmark.watermark.tasks.keys import card

    if plot:
        refuse_foreign(plot, force)
    key = Key.load(path)
    if plot:
        from ringmark.watermark.figures import key_figure, save_figure

        save_figure(key_figure(key), plot, 0o600, force=force)
    description = describe(key)
    say(description, card(key), as_json)


@keys.command("export-public")
@click.argument("path", metavar="KEY", type=PATH)
@click.option("-o", "--output", type=FilePath(".json"), required=True, help="The public record to write.")
@force_option
@json_option
def keys_export_public(path: Path, output: Path, force: bool, as_json: bool) -> None:
    """Write a record of a key that may be published: its description and a commitment to its secret.

    The commitment is a SHA-256 of description and secret. Published today, it proves that the key existed today and
    was not made up later to fit an image. It does not reveal the key.

    \b
    Example:
      ringmark keys export-public my.key -o my-public.json
    """
    from ringmark.data.files import refuse_existing
    from ringmark.watermark.keys.folder import export_public
    from ringmark.watermark.keys.key import Key

    refuse_existing(output, force=force)
    record = export_public(Key.load(path), output)
    say(
        record,
        f"public record of key {record['fingerprint']} written to {output}; it does not show the secret",
        as_json,
    )
