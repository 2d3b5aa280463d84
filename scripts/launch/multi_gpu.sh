#!/usr/bin/env bash
# Trains on the GPUs of this node, in the recipe's layout; without GPUS, one process per GPU:
#
#   RECIPE=mine GPUS=4 bash scripts/launch/multi_gpu.sh [--OPTION VALUE ...]
set -euo pipefail
source "$(dirname "$0")/activate.sh"
exec shoal train "${RECIPE:-scale/gpt2-124m-4-gpus}" ${GPUS:+--processes "$GPUS"} "$@"
