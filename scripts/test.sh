#!/usr/bin/env bash
# Style, types and tests. Usage: bash scripts/test.sh [--all] [OPTIONS OF pytest]
# --all adds the tests marked slow: experiments, long command lines.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
selection=()
if [ "${1:-}" = --all ]; then
    selection=(-m "")
    shift
fi
say "checking style"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
say "checking types"
PYTHON=.venv/bin/python bash scripts/typecheck.sh
say "running the tests"
workers=$(.venv/bin/python -c 'import os; print(min(8, os.cpu_count() or 1))')
.venv/bin/python -m pytest -n "$workers" --dist worksteal ${selection[@]+"${selection[@]}"} "$@"
