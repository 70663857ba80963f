#!/usr/bin/env bash
# mypy --strict on the product. The rooms at the top are installed as subpackages of ringmark, which mypy has to see in
# one place: build/typecheck holds links that show it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
rm -rf build/typecheck
mkdir -p build/typecheck/ringmark
for item in ringmark/* inversion watermark data; do
    ln -s "$PWD/$item" "build/typecheck/ringmark/$(basename "$item")"
done
MYPYPATH=build/typecheck "$python" -m mypy --strict -p ringmark "$@"
