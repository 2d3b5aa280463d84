#!/usr/bin/env bash
# Trains with FSDP2: the GPUs share one copy of the model.
#
#   RECIPE=mine GPUS=4 bash scripts/launch/train_fsdp.sh [--OPTION VALUE ...]
#
# On several nodes, on each of them:  ... --launch.nodes 2 --launch.rendezvous node0:29400
set -euo pipefail
source "$(dirname "$0")/activate.sh"
exec shoal train "${RECIPE:-scale/gpt2-355m-fsdp}" ${GPUS:+--processes "$GPUS"} \
    --parallel.dp_replicate=1 --parallel.dp_shard=-1 "$@"
