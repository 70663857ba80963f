"""Commands as a user would run them."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from ringmark.watermark.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--steps", "4", "--max-steps", "1"]


def run(*args: object, code: int | tuple[int, ...] = 0) -> Result:
    """Run a command as a user would, which must end with this code or one of these; stderr apart from stdout."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    assert result.exit_code in (code if isinstance(code, tuple) else (code,)), (
        result.output,
        result.stderr,
        result.exception,
    )
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def refused(*args: object) -> str:
    """The one line by which a command refuses its arguments."""
    message = run(*args, code=2).stderr.strip()
    assert "Traceback" not in message
    if message.startswith("Error: "):
        assert "\n" not in message
    return message


def pictures(house: Path, kind: str = "*") -> list[Path]:
    return sorted((house / "images").glob(f"{kind}/*.png"))
