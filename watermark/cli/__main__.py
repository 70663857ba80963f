"""Entry point of `python -m ringmark.watermark.cli`."""

from __future__ import annotations

from ringmark.watermark.cli.main import main

main()
