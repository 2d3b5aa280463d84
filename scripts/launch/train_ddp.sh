#!/usr/bin/env bash
# Trains with DDP: each GPU holds the whole model.
#
#   RECIPE=mine GPUS=4 bash scripts/launch/train_ddp.sh [--OPTION VALUE ...]
#
# On several nodes, on each of them:  ... --launch.nodes 2 --launch.rendezvous node0:29400
set -euo pipefail
source "$(dirname "$0")/activate.sh"
exec shoal train "${RECIPE:-scale/gpt2-124m-4-gpus}" ${GPUS:+--processes "$GPUS"} \
    --parallel.dp_replicate=-1 --parallel.dp_shard=1 "$@"
