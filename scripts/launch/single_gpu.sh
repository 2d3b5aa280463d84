#!/usr/bin/env bash
# Trains on one GPU, or on the CPU if there is none:
#
#   RECIPE=mine bash scripts/launch/single_gpu.sh [--OPTION VALUE ...]
set -euo pipefail
source "$(dirname "$0")/activate.sh"
exec shoal train "${RECIPE:-scale/gpt2-124m-1-gpu}" --processes 1 "$@"
