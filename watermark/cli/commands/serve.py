"""Answer questions over HTTP, and make the tokens for it."""

from __future__ import annotations

from pathlib import Path

import click

from ringmark.watermark.cli.commands.verify import UNCHECKED
from ringmark.watermark.cli.options import (
    PATH,
    DetectionOptions,
    Finite,
    InversionOptions,
    ModelOptions,
    detection_options,
    fitting_batch_option,
    inversion_options,
    json_option,
    model_options,
    say,
    warn,
)

TOKENS_HELP = "File of tokens, made by ringmark token, with mode 0600."


@click.command()
@detection_options
@inversion_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; others need --tokens.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--tokens", type=PATH, help=TOKENS_HELP)
@click.option("--jobs", "jobs_folder", type=PATH, help="Folder for batches, which are refused without it.")
@click.option(
    "--allow-urls", is_flag=True, help="Fetch pictures from URLs and call webhooks, at public addresses only."
)
@click.option(
    "--waiting", type=click.IntRange(1), default=128, show_default=True, help="Pictures that may wait at a time."
)
@click.option(
    "--deadline",
    type=Finite(0, 3600, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds until a request without a verdict is given up.",
)
@click.option("--max-mb", type=click.IntRange(1), default=32, show_default=True, help="Maximum size of a picture.")
@fitting_batch_option
@model_options
def serve(
    detection: DetectionOptions,
    inversion: InversionOptions,
    host: str,
    port: int,
    tokens: Path | None,
    jobs_folder: Path | None,
    allow_urls: bool,
    waiting: int,
    deadline: float,
    max_mb: int,
    batch: int | None,
    model: ModelOptions,
) -> None:
    """Verify pictures over HTTP, with a web page at /.

    Needs the extra ringmark[serve]. Callers see verdicts without p-values, unless their token has the scope p. SIGTERM
    and SIGINT end the service once the requests in work are answered; jobs go on after a restart.

    \b
    Example:
      ringmark serve --key my.key --port 8000
    """
    from ringmark.watermark.service.installed import check_installed

    check_installed()
    from ringmark.watermark.service import access, fetch, jobs, run, service

    allowed = access.Access(access.load_tokens(tokens) if tokens else None)
    with run.bind(host, port, tokens=tokens is not None) as bound:
        verifier, unchecked = detection.prepare(model, inversion)
        limits = service.Limits(
            waiting=waiting, deadline=deadline, max_bytes=max_mb << 20, batch=batch or verifier.batch
        )
        served = service.Service(
            verifier,
            access=allowed,
            limits=limits,
            fetcher=fetch.Fetcher() if allow_urls else None,
            jobs=jobs.Jobs(jobs_folder) if jobs_folder else None,
        )
        place = f"[{host}]" if ":" in host else host
        warn([f"http://{place}:{bound.getsockname()[1]} verifies pictures; stop it with Ctrl-C"])
        if unchecked:
            warn([f"{UNCHECKED} ({unchecked})"])
        run.serve(served, bound)


@click.command()
@click.argument("name")
@click.option("--tokens", type=PATH, required=True, help=TOKENS_HELP)
@click.option(
    "--scope",
    type=click.Choice(["verdict", "p"]),
    default="verdict",
    show_default=True,
    help="What its holder sees: verdicts only, or also p-values, which help to remove or forge marks.",
)
@click.option(
    "--per-minute", type=click.IntRange(1), default=600, show_default=True, help="Pictures it may send per minute."
)
@click.option("--revoke", is_flag=True, help="Remove the token instead.")
@json_option
def token(name: str, tokens: Path, scope: str, per_minute: int, revoke: bool, as_json: bool) -> None:
    """Make a token for ringmark serve, and print it once; the file holds only its hash.

    The file is made if it is missing. Restart a running service to apply the change.

    \b
    Example:
      ringmark token alice --tokens tokens.json
    """
    from ringmark.watermark.service.access import add_token, remove_token

    if revoke:
        remove_token(tokens, name)
        say({"name": name, "token": None}, f"token {name} removed from {tokens}", as_json)
    else:
        made = add_token(tokens, name, "p" if scope == "p" else "verdict", per_minute)
        say({"name": name, "token": made}, made, as_json)
