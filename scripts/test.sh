#!/usr/bin/env bash
# The whole test suite. Usage: bash scripts/test.sh [OPTIONS OF pytest]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
say "checking style"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
say "running the tests"
.venv/bin/python -m pytest "$@"
