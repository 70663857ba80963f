#!/usr/bin/env bash
# The main job on the embedded model: key, images, verdicts, audit, ROC. What it makes is in demo/.
# Usage: bash scripts/demo.sh [OPTIONS OF ringmark demo]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
say "running ringmark demo"
.venv/bin/ringmark demo "$@"
