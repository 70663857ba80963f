"""The commands; no logic. Heavy imports wait until a command runs, so that --help answers at once."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

EXIT_ABSENT, EXIT_USAGE, EXIT_INCONCLUSIVE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 3, 130, 141
RESUMED = ("generate", "audit", "calibrate", "evaluate", "attack", "demo")
SEED = click.IntRange(0, 2**62)  # torch and NumPy take 63 bits; each further image adds 1


class FilePath(click.Path):
    """A path, which an empty string is not, with one of these suffixes if there are any."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(path_type=Path)
        self.suffixes = suffixes

    def convert(self, value, param, ctx) -> Path:
        if not os.fspath(value):
            self.fail("the name is empty; name a file or folder", param, ctx)
        path = super().convert(value, param, ctx)
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"{path}: the name must end in {' or '.join(self.suffixes)}", param, ctx)
        return path


class Finite(click.FloatRange):
    """A range of numbers; what is not a number is in none, though it is not out of any either."""

    def convert(self, value, param, ctx) -> float:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number", param, ctx)
        return found


PATH, FIGURE = FilePath(), FilePath(".png", ".svg")


class Ringmark(click.Group):
    """Turns errors into exit code 2, the library's own into one line; 1 is for verdicts alone."""

    def main(self, *args, **extra):
        with _closed_pipe():
            return super().main(*args, **extra)

    def make_context(self, *args, **extra) -> click.Context:
        with _closed_pipe():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context):
        with _closed_pipe():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as stop:
                goes_on = "; what is done is kept, the same command goes on from here"
                said = f": {stop}" if str(stop) else goes_on if ctx.invoked_subcommand in RESUMED else ""
                click.echo("interrupted" + said, err=True)
                ctx.exit(EXIT_INTERRUPTED)
            except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
                raise
            except Exception as error:
                if shown := _one_line(error):
                    raise shown from error
                traceback.print_exc()
                ctx.exit(EXIT_USAGE)


@contextmanager
def _closed_pipe() -> Iterator[None]:
    """Ends quietly where nobody reads on; click itself would end with 1, which is a verdict."""
    try:
        yield
    except BrokenPipeError:
        # What is still buffered has nowhere to go either, of which Python would complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE)


def _one_line(error: Exception) -> click.ClickException | None:
    """The library's errors and the system's for the user; None for any other."""
    from ringmark.errors import RingmarkError
    from ringmark.watermark.cli.remedies import explained, explained_system_error

    if isinstance(error, RingmarkError):
        message = explained(error)
    elif isinstance(error, OSError) and error.strerror:
        message = explained_system_error(error)
    else:
        return None
    shown = click.ClickException(message)
    shown.exit_code = EXIT_USAGE
    return shown


def options(*decorators):
    """Several click options as one decorator."""

    def apply(command):
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


model_options = options(
    click.option(
        "--model", "source", default="pocket", show_default=True, help='"pocket", a diffusers folder or a hub id.'
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …"),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        help="auto: float16 on CUDA, float32 on a CPU.",
    ),
)
steps_option = click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="DDIM steps.")
batch_option = click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Images at a time.")
inversion_options = options(
    click.option(
        "--method",
        type=click.Choice(["encoder", "forward", "km", "adam", "anderson", "guarded", "gradient", "gradient-lean"]),
        default="guarded",
        show_default=True,
        help="Decoder inversion: guarded bears altered pictures, anderson is the most accurate on others, encoder is none, gradient the slow baseline, which lean runs in less memory.",
    ),
    click.option(
        "--max-steps", type=click.IntRange(0), help="Steps of the decoder inversion.  [default: the method's own]"
    ),
    steps_option,
)
alpha_option = click.option(
    "--alpha",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=1e-3,
    show_default=True,
    help="A key is present at p ≤ ALPHA, corrected for the number of keys.",
)
keys_option = click.option(
    "--key",
    "key_paths",
    type=PATH,
    multiple=True,
    required=True,
    help="A key file or a folder of keys; repeat for several.",
)
calibration_option = click.option(
    "--calibration",
    type=PATH,
    help="p-values and a check of them from what ringmark calibrate wrote.  [default: the model's own, if it has one for these settings]",
)
search_option = click.option(
    "--search",
    is_flag=True,
    help="Look for the keys also as if the picture had been turned, enlarged, cropped or moved; for each image in which none is found that takes several times as long.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
force_option = click.option("--force", is_flag=True, help="Replace what is there.")
seed_option = click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the first image's noise.")
guidance_option = click.option(
    "--guidance", type=Finite(1), default=3.0, show_default=True, help="Classifier-free guidance; 1 is none."
)


def load_model(source: str, device: str, dtype: str):
    """The model these options name."""
    from ringmark.watermark.tasks import load

    return load.load_model(source, device, dtype)


def load_detector(
    model: tuple[str, str, str],
    key_paths: tuple[Path, ...],
    method: str,
    max_steps: int,
    steps: int,
    alpha: float,
    calibration: Path | None,
    search: bool,
    quiet: bool,
):
    """A detector for these keys, on this calibration or the model's own; a bad file does not cost the loading of the model."""
    from ringmark.inversion.models.loading import resolve
    from ringmark.inversion.recover import Recoverer
    from ringmark.watermark.calibration import Calibration
    from ringmark.watermark.detect.search import Search
    from ringmark.watermark.detect.verifier import Verifier, built_in_calibration
    from ringmark.watermark.keys.folder import load_ring

    keys = list(load_ring(key_paths).values())
    given = Calibration.load(calibration) if calibration else None
    if given:
        given.check_level(alpha)
    recoverer = Recoverer.named(load_model(*model), method, max_steps, steps)
    used, unfit = (given, "") if given else built_in_calibration(recoverer, keys, Path(resolve(model[0])))
    if unfit and not quiet:
        click.echo(f"note: {unfit}. p rests on what is known of the model, and is not checked by ranks", err=True)
    return Verifier(recoverer, keys, alpha=alpha, calibration=used, search=Search() if search else None)


def say(result: dict | list, text: str, as_json: bool) -> None:
    """Print a result for a person or for a program."""
    from ringmark.data.files import one_line

    click.echo(json.dumps(result, indent=1, default=str) if as_json else "\n".join(map(one_line, text.split("\n"))))


def _span(text: str) -> range:
    """'3-10' as the numbers from 3 to 10, '3' as 3 alone. Raises ValueError."""
    low, dash, high = text.partition("-")
    span = range(int(low), int(high if dash else low) + 1)
    if not 0 < len(span) <= 1000:  # no latent has so many channels or rings
        raise ValueError(text)
    return span


def channel_numbers(ctx, param, value: str | None) -> tuple[int, ...] | None:
    """'0,2' as 0 and 2, '0-3' as 0, 1, 2 and 3."""
    try:
        return None if value is None else tuple(n for part in value.split(",") for n in _span(part))
    except ValueError:
        raise click.BadParameter(f"{value!r}: rising whole numbers are needed, as in 0,2 or 0-3") from None


def radius_range(ctx, param, value: str | None) -> tuple[int, int] | None:
    """'3-10' as 3 and 10."""
    if value is None:
        return None
    try:
        span = _span(value if "-" in value else "")
    except ValueError:
        raise click.BadParameter(f"{value!r}: two rising whole numbers are needed, as in 3-10") from None
    return span[0], span[-1]


def names(ctx, param, values: tuple[str, ...]) -> tuple[str, ...]:
    """'a,b' and 'c' as a, b and c."""
    return tuple(name.strip() for value in values for name in value.split(","))


@click.group(cls=Ringmark, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ringmark")
def main() -> None:
    """Tell whether an image was made by your latent diffusion model.

    \b
    A key is planted as a ring in the Fourier transform of the initial noise:
      ringmark keygen -o my.key
      ringmark generate --key my.key -n 4 -o marked
      ringmark verify marked/*.png --key my.key
    """


@main.command()
@click.option("-o", "--output", type=PATH, required=True, help="The key file to write; with -n, the folder.")
@click.option(
    "-n",
    "--number",
    type=click.IntRange(1),
    help="Make so many, that can be told apart, in a folder: beside the keys in it, or with --force instead of them.",
)
@click.option(
    "--pattern",
    type=click.Choice(["ring", "rand", "zeros"]),
    default="rand",
    show_default=True,
    help="On the rings: rand, a value a frequency; ring, one a circle (survives flips and rotation); zeros, nothing.",
)
@click.option(
    "--mask",
    type=click.Choice(["centred", "published"]),
    default="centred",
    show_default=True,
    help="published: one row off centre, as in the tree-ring paper's code.",
)
@click.option(
    "--channels",
    callback=channel_numbers,
    help="Latent channels, as in 0,2 or 0-3.  [default: where this model's noise is best recovered]",
)
@click.option("--radii", callback=radius_range, help="Range of ring radii, as in 3-10.  [default: likewise]")
@click.option(
    "--calibration",
    type=PATH,
    help="Where noise is best recovered, by what ringmark calibrate wrote.  [default: what is known of the model]",
)
@click.option(
    "--budget",
    type=Finite(0, 1, min_open=True),
    help="Share of the noise's coefficients that the recommended mark may alter.  [default: 0.08]",
)
@model_options
@force_option
@json_option
def keygen(
    output, number, pattern, mask, channels, radii, calibration, budget, source, device, dtype, force, as_json
) -> None:
    """Make a key, or a ring of keys, from the operating system's random numbers.

    \b
    Example:
      ringmark keygen -o my.key
      ringmark keygen -n 64 -o ring
    """
    from ringmark.watermark.calibration import Calibration
    from ringmark.watermark.keys.folder import describe
    from ringmark.watermark.keys.key import refuse_existing
    from ringmark.watermark.schemes.base import DEFAULT, scheme_of
    from ringmark.watermark.statistics import ALPHA
    from ringmark.watermark.tasks.keygen import grow, keys_in, new_key

    old = keys_in(output) if number else {}
    if not (number or force):
        refuse_existing(output)
    measured = Calibration.load(calibration) if calibration else None
    model = load_model(source, device, dtype)
    chosen = {"pattern": pattern, "mask": mask, "channels": channels, "radii": radii, "budget": budget}
    make = partial(new_key, model, DEFAULT, measured, **chosen)
    if number:
        found = grow(model, output, number, make, old, force=force)
        text = f"{number} keys written to {output}, beside {found.kept} kept; {found.drawn_again} drawn again for being too close to another. Keep them secret."
        say([{"path": str(path)} | describe(key) for path, key in found.new.items()], text, as_json)
        return
    key = make()
    scheme_of(key).check_findable(ALPHA)
    key.save(output, overwrite=force)
    low, high = key.metadata["radii"]
    text = f"key {key.fingerprint} written to {output}: {pattern} in channel {', '.join(map(str, key.metadata['channels']))}, radii {low}-{high}, for model {model.name}. Keep it secret."
    say({"path": str(output), "fingerprint": key.fingerprint} | key.metadata, text, as_json)


@main.group()
def keys() -> None:
    """List, show and publish what may be known of keys; never their secret values.

    \b
    Example:
      ringmark keys list ring
      ringmark keys show my.key --plot key.png
      ringmark keys export-public my.key -o my-public.json
    """


@keys.command("list")
@click.argument("paths", metavar="FOLDER|FILE...", type=PATH, nargs=-1, required=True)
@json_option
def keys_list(paths, as_json) -> None:
    """A line a key, of files and of folders of keys.

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
    help="Draw the key into this PNG or SVG. Whoever has the picture has the key: keep it secret.",
)
@json_option
def keys_show(path, plot, as_json) -> None:
    """What a key is for, and its fingerprint and commitment.

    \b
    Example:
      ringmark keys show my.key
    """
    from ringmark.watermark.keys.folder import describe
    from ringmark.watermark.keys.key import Key

    key = Key.load(path)
    if plot:
        from ringmark.watermark.figures import key_figure, save_figure

        save_figure(key_figure(key), plot, 0o600)
    found = describe(key)
    say(found, "\n".join(f"{name:14}{value}" for name, value in found.items()), as_json)


@keys.command("export-public")
@click.argument("path", metavar="KEY", type=PATH)
@click.option("-o", "--output", type=FilePath(".json"), required=True, help="The public record to write.")
@force_option
@json_option
def keys_export_public(path, output, force, as_json) -> None:
    """Write what may be published of a key: its description and a commitment, SHA-256 of description and values.

    A record published today proves that the key existed today: that it was not made up afterwards to fit an image
    that is younger than the record. It does not show the key.

    \b
    Example:
      ringmark keys export-public my.key -o my-public.json
    """
    from ringmark.data.files import refuse_existing
    from ringmark.watermark.keys.folder import export_public
    from ringmark.watermark.keys.key import Key

    refuse_existing(output, force=force)
    record = export_public(Key.load(path), output)
    say(record, f"public record of key {record['fingerprint']} written to {output}; it shows no values", as_json)


@main.command()
@click.option("-o", "--output", type=PATH, required=True, help="The folder to draw into.")
@click.option("--key", "key_path", type=PATH, help="Mark the images with this key.")
@click.option("--no-mark", is_flag=True, help="Draw unmarked images.")
@click.option("-n", "--number", type=click.IntRange(1), help="How many images.  [default: one a prompt]")
@click.option(
    "--prompt", "prompts", multiple=True, help="A prompt; repeat for several.  [default: captions of procedural scenes]"
)
@seed_option
@guidance_option
@steps_option
@batch_option
@model_options
@json_option
def generate(
    output, key_path, no_mark, number, prompts, seed, guidance, steps, batch, source, device, dtype, as_json
) -> None:
    """Draw marked or unmarked images.

    \b
    Example:
      ringmark generate --key my.key --prompt "lake at sunset with snowy mountains" -n 4 -o marked
    """
    from ringmark.watermark.keys.key import Key
    from ringmark.watermark.tasks.audit import draw, prompts_for

    if bool(key_path) == no_mark:
        raise click.UsageError("give either --key KEY to mark the images or --no-mark")
    key = Key.load(key_path) if key_path else None
    model = load_model(source, device, dtype)
    texts = prompts_for(list(prompts), number or max(1, len(prompts)), seed)
    paths = draw(model, output, texts, seed, key=key, steps=steps, guidance=guidance, batch=batch)
    say(
        [{"path": str(p), "prompt": t} for p, t in zip(paths, texts, strict=True)],
        f"{len(paths)} {'marked' if key else 'unmarked'} images in {output}",
        as_json,
    )


@main.command()
@click.argument("folders", metavar="FOLDER...", type=PATH, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="The calibration to write. The folder OUTPUT.cache beside it keeps what is done until the end: a stopped run goes on from there, or delete it.",
)
@click.option("--plot", type=FIGURE, help="Draw how well noise is recovered, by ring, into this PNG or SVG.")
@inversion_options
@batch_option
@force_option
@model_options
@json_option
def calibrate(folders, output, plot, method, max_steps, steps, batch, force, source, device, dtype, as_json) -> None:
    """Measure what recovered noise looks like in unmarked images, so that p-values hold for images like them.

    A calibration is for one model and one way of inversion: verify and audit with the same options. Where 32 or more
    of the images were drawn by this model (generate --no-mark), it also tells keygen where to put a mark. Exit code 0:
    written, whatever had to be left out; 2: usage, or too few images; 130: interrupted.

    \b
    Example:
      ringmark calibrate unmarked photographs -o my-calibration.safetensors
    """
    from ringmark.data.files import refuse_existing
    from ringmark.inversion.recover import Recoverer
    from ringmark.watermark.tasks import calibrate as making

    refuse_existing(output, force=force)
    images = making.Unmarked.of(folders)
    looking = Recoverer.named(load_model(source, device, dtype), method, max_steps, steps)
    found = making.calibrate(looking, images, output, batch=batch)
    if plot and found.calibration.recovery:
        from ringmark.watermark.figures import recovery_figure, save_figure

        save_figure(recovery_figure(found.calibration.recovery), plot)
    for error in () if as_json else found.errors:
        click.echo(error, err=True)
    say(found.record(), found.sentence(), as_json)


@main.command()
@click.argument("images", type=PATH, nargs=-1, required=True)
@keys_option
@alpha_option
@inversion_options
@batch_option
@calibration_option
@search_option
@click.option(
    "--explain",
    type=FIGURE,
    help="Draw what the first image's verdict rests on into this PNG or SVG. It shows the key: keep it as secret.",
)
@model_options
@json_option
@click.pass_context
def verify(
    ctx,
    images,
    key_paths,
    alpha,
    method,
    max_steps,
    steps,
    batch,
    calibration,
    search,
    explain,
    source,
    device,
    dtype,
    as_json,
) -> None:
    """Say of each image whether it carries a key.

    Exit code 0: all do; 1: some do not; 2: usage, or a file that cannot be read; 3: inconclusive.

    \b
    Example:
      ringmark verify picture.png --key my.key --explain why.png
    """
    from ringmark.watermark.tasks.verify import verify_files

    detector = load_detector(
        (source, device, dtype), key_paths, method, max_steps, steps, alpha, calibration, search, as_json
    )
    outcome = verify_files(detector, list(images), batch=batch, explain_to=explain)
    for line in outcome:
        if not as_json:
            click.echo(line.text, err=line.unreadable)
    if as_json:
        click.echo(json.dumps([line.record for line in outcome], indent=1))
    codes = [line.exit_code for line in outcome]
    ctx.exit(max(codes, key=[0, EXIT_ABSENT, EXIT_INCONCLUSIVE, EXIT_USAGE].index))


@main.command()
@click.argument("folder", type=PATH)
@keys_option
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="Results, a JSON line a file; started again, the audit goes on from here.",
)
@alpha_option
@inversion_options
@batch_option
@calibration_option
@search_option
@model_options
@json_option
def audit(
    folder,
    key_paths,
    output,
    alpha,
    method,
    max_steps,
    steps,
    batch,
    calibration,
    search,
    source,
    device,
    dtype,
    as_json,
) -> None:
    """Look for keys in every image of a folder, recursively.

    A file that has changed since its record was made is looked at again. Exit code 0: every image has its record,
    carrying, not, inconclusive or unreadable; 2: usage, or no such folder; 130: interrupted.

    \b
    Example:
      ringmark audit pictures --key my.key --key old.key -o results.jsonl
    """
    from ringmark.data.sources import check_folder
    from ringmark.watermark.tasks import audit as runs

    check_folder(folder)
    detector = load_detector(
        (source, device, dtype), key_paths, method, max_steps, steps, alpha, calibration, search, as_json
    )
    found = runs.audit(detector, folder, output, batch=batch)
    keys = "".join(f"\n  key {name[:8]}: {count}" for name, count in found.by_key.items())
    text = f"{found.images} images: {found.present} carry a key, {found.absent} do not, {found.inconclusive} inconclusive, {found.unreadable} unreadable; {found.skipped} other files skipped; records in {output}{keys}"
    for error in () if as_json else found.errors:
        click.echo(error, err=True)
    say(asdict(found), text, as_json)


@main.command()
@click.argument("results", type=PATH, nargs=-1, required=True)
@click.option(
    "--labels",
    type=PATH,
    multiple=True,
    required=True,
    help="CSV with path,label or JSON {path: label}; repeat for several.",
)
@click.option("-o", "--output", type=FIGURE, help="Draw the curves into this PNG or SVG.")
@click.option(
    "--fpr",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="FPR at which the TPR is reported.",
)
@json_option
def roc(results, labels, output, fpr, as_json) -> None:
    """ROC and AUC from audits of labelled images.

    \b
    Example:
      ringmark roc results.jsonl --labels marked/labels.csv --labels unmarked/labels.csv -o roc.png
    """
    from ringmark.watermark.figures import roc_figure, save_figure, table
    from ringmark.watermark.tasks.audit import curves_of_files

    found, matched = curves_of_files(list(results), list(labels), fpr)
    if output:
        save_figure(roc_figure(found), output)
    click.echo(matched, err=as_json)
    say([c.summary() for c in found], table(found) + (f"\ncurves drawn into {output}" if output else ""), as_json)


@main.command()
@click.option("-o", "--output", type=PATH, required=True, help="Folder for images, records, tables and plots.")
@click.option(
    "--key",
    "key_paths",
    type=PATH,
    multiple=True,
    help="A key file or a folder of keys; repeat for several, one a pattern, say.  [default: a new one, kept in OUTPUT]",
)
@click.option("--marked", type=PATH, help="Folder of images marked with the one --key.  [default: they are drawn]")
@click.option("--unmarked", type=PATH, help="Folder of unmarked images.  [default: they are drawn]")
@click.option(
    "-n",
    "--n",
    "--number",
    "number",
    type=click.IntRange(2),
    default=32,
    show_default=True,
    help="Images of each kind to draw.",
)
@click.option(
    "--attacks",
    multiple=True,
    callback=names,
    help="As in jpeg:25,blur:4 or tree-ring (see ringmark attack --list); may be repeated.  [default: none]",
)
@click.option(
    "--methods",
    default=("encoder,guarded",),
    multiple=True,
    show_default=True,
    callback=names,
    help="Decoder inversions to compare.",
)
@seed_option
@guidance_option
@click.option(
    "--max-steps", type=click.IntRange(0), help="Steps of the decoder inversion.  [default: the method's own]"
)
@steps_option
@batch_option
@calibration_option
@model_options
@json_option
def evaluate(
    output,
    key_paths,
    marked,
    unmarked,
    number,
    attacks,
    methods,
    seed,
    guidance,
    max_steps,
    steps,
    batch,
    calibration,
    source,
    device,
    dtype,
    as_json,
) -> None:
    """How well keys are found under attacks, by several decoder inversions: AUC, TPR, time, memory and cost in quality.

    Marked and unmarked images are independent. What was computed is kept: a stopped run goes on, and one more attack,
    method or key, named beside the others, costs no more than itself. Tables (evaluation.md, .csv, .json, scores.csv)
    and plots are of what this run names.

    \b
    Example:
      ringmark evaluate -n 200 --attacks tree-ring --methods encoder,guarded -o evaluation
    """
    from ringmark.inversion.models.loading import resolve
    from ringmark.watermark.evaluation.report import summary
    from ringmark.watermark.tasks.evaluate import Comparison, compare

    images = (output, key_paths, marked, unmarked, number)
    plan = Comparison(*images, attacks, methods, seed, guidance, max_steps, steps, batch, calibration)
    found = compare(load_model(source, device, dtype), plan, Path(resolve(source)))
    for error in () if as_json else found.refused:
        click.echo(error, err=True)
    say(found.record(), f"{summary(found)}\n{len(found.refused)} files refused; tables and plots in {output}", as_json)


def list_attacks(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print all attacks and end."""
    if value and not ctx.resilient_parsing:
        from ringmark.watermark.attacks.chains import listing

        click.echo(listing())
        ctx.exit()


@main.command()
@click.argument("path", metavar="IN", type=PATH)
@click.argument("output", metavar="OUT", type=PATH)
@click.option(
    "--attack",
    "specs",
    multiple=True,
    required=True,
    help="As in jpeg:25, jpeg:25+blur:4 (one after the other) or tree-ring (a preset); repeat for several.",
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=list_attacks,
    help="Name all attacks and presets, with what they take, and end.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of what is drawn at random; each image's own follows from it and the image's path below IN.",
)
@force_option
@model_options
@json_option
@click.pass_context
def attack(ctx, path, output, specs, seed, force, source, device, dtype, as_json) -> None:
    """Distort an image, or all of a folder, recursively: what a mark must survive.

    Writes PNG; several attacks have a folder each, in OUT. What is there already from the same source and attack is
    not made again. A model is loaded for vae and diffuse only. Exit code 0: all images are there; 2: usage, or some
    could not be attacked; 130: interrupted.

    \b
    Example:
      ringmark attack marked attacked --attack jpeg:25+blur:4 --attack tree-ring
    """
    from ringmark.watermark.attacks.chains import expand
    from ringmark.watermark.tasks.attack import attack_files

    chains = expand(specs)
    model = load_model(source, device, dtype) if any(chain.needs_model for chain in chains) else None
    found = attack_files(path, output, chains, seed=seed, model=model, force=force)
    for error in () if as_json else found.errors:
        click.echo(error, err=True)
    text = f"{found.written} attacked images written, {found.kept} were there already; in {output}"
    say(asdict(found), text, as_json)
    ctx.exit(EXIT_USAGE if found.errors else 0)


@main.command()
@click.argument("image", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="safetensors file for latents, noise and residuals.")
@inversion_options
@model_options
@force_option
@json_option
def invert(image, output, method, max_steps, steps, source, device, dtype, force, as_json) -> None:
    """Recover an image's latent and initial noise.

    \b
    Example:
      ringmark invert picture.png -o noise.safetensors --method anderson
    """
    from ringmark.data.files import refuse_existing
    from ringmark.inversion.recover import Recoverer
    from ringmark.watermark.tasks.verify import invert_file

    refuse_existing(output, force=force)
    facts = invert_file(Recoverer.named(load_model(source, device, dtype), method, max_steps, steps), image, output)
    say(
        facts,
        f"{image}: {facts['status']} after {facts['evaluations']} evaluations, residual {facts['residual'] or 'not computed'}; latents and noise in {output}",
        as_json,
    )


@main.command()
@click.option(
    "-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder for what the demo makes."
)
@click.option("-n", "--number", type=click.IntRange(2), default=24, show_default=True, help="Images of each kind.")
def demo(output, number) -> None:
    """The whole job on the embedded model: key, images, verdicts, audit, ROC.

    \b
    Example:
      ringmark demo -o demo
    """
    key, results = output / "my.key", output / "results.jsonl"
    marked, unmarked = output / "images" / "marked", output / "images" / "unmarked"
    first = [str(folder / f"{seed:07d}.png") for folder, seed in ((marked, 0), (unmarked, number))]
    steps = [
        ["generate", "--key", str(key), "-n", str(number), "-o", str(marked)],
        ["generate", "--no-mark", "-n", str(number), "--seed", str(number), "-o", str(unmarked)],
        ["verify", *first, "--key", str(key), "--explain", str(output / "explain.png")],
        ["audit", str(output / "images"), "--key", str(key), "-o", str(results)],
        [
            "roc",
            str(results),
            "--labels",
            str(marked / "labels.csv"),
            "--labels",
            str(unmarked / "labels.csv"),
            "-o",
            str(output / "roc.png"),
        ],
    ]
    for step in steps if key.exists() else [["keygen", "-o", str(key)], *steps]:
        click.secho("\n$ ringmark " + " ".join(step), bold=True)
        code = main.main(step, standalone_mode=False) or 0
        if code not in (0, EXIT_ABSENT):
            sys.exit(code)
    click.echo(f"\nImages, key, records and plots are in {output}.")


@main.command()
@model_options
@json_option
def info(source, device, dtype, as_json) -> None:
    """Facts about a model and this installation.

    \b
    Example:
      ringmark info --model pocket
    """
    from ringmark.watermark.tasks.verify import facts

    found = facts(load_model(source, device, dtype))
    say(found, "\n".join(f"{name:18} {value}" for name, value in found.items()), as_json)


if __name__ == "__main__":
    main()
