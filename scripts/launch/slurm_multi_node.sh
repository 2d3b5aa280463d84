#!/usr/bin/env bash
# Submits a Slurm job that trains on several nodes:
#
#   RECIPE=mine NODES=4 TIME_LIMIT=24:00:00 bash scripts/launch/slurm_multi_node.sh [--OPTION VALUE ...]
#
# Partition, account, modules and the GPUs of a node are in cluster.yaml (docs/CLUSTERS.md); GPUS_PER_NODE=4 replaces the
# last. SUBMIT=0 only writes the batch script, to be read.
set -euo pipefail
source "$(dirname "$0")/activate.sh"
submit=(--submit)
if [ "${SUBMIT:-1}" = 0 ]; then submit=(); fi
exec shoal launch slurm "${RECIPE:-scale/llama-1b}" --nodes "${NODES:-2}" \
    ${GPUS_PER_NODE:+--gpus-per-node "$GPUS_PER_NODE"} --time "${TIME_LIMIT:-24:00:00}" "${submit[@]}" "$@"
