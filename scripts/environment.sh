# Sourced by demo.sh and test.sh: makes .venv with ringmark in it, or reuses the one that is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '\n== %s\n' "$*"; }
trap 'printf "\nstopped: line %s of %s failed (see above)\n" "$LINENO" "${BASH_SOURCE[0]}" >&2' ERR

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "ringmark needs Python 3.10 or newer; name one with PYTHON=/path/to/python" >&2
    exit 2
fi
if [ ! -x .venv/bin/python ]; then
    say "making an environment in .venv"
    "$python" -m venv .venv || { echo "the venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
fi
# Installed once for these files; a change to any of them installs again.
stamp=$(cat setup.cfg pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/ringmark-installed 2>/dev/null || true)" != "$stamp" ]; then
    say "installing ringmark and what it needs (a minute or two)"
    # The pinned set needs Python 3.11; on 3.10 pip chooses what fits.
    pins=$(.venv/bin/python -c 'import sys; print("-cconstraints.txt" if sys.version_info >= (3, 11) else "--prefer-binary")')
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$pins" torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$pins" -e '.[test,docs]'
    echo "$stamp" > .venv/ringmark-installed
else
    say "reusing the environment in .venv"
fi
export HF_HUB_OFFLINE=1
