#!/usr/bin/env bash
# Starts a recipe with the means of this machine, options as in slurm_multi_node.sh and multi_gpu.sh:
#
#   RECIPE=mine NODES=2 TIME_LIMIT=24:00:00 bash scripts/launch/submit.sh [--OPTION VALUE ...]   as a Slurm job
#   RECIPE=mine HOSTS_FILE=hosts.txt bash scripts/launch/submit.sh [--OPTION VALUE ...]          on hosts, through ssh
#   RECIPE=mine GPUS=8 bash scripts/launch/submit.sh [--OPTION VALUE ...]                        on this node
set -euo pipefail
folder=$(dirname "$0")
source "$folder/activate.sh"
if [ -n "${HOSTS_FILE:-}" ]; then
    exec shoal launch hosts "${RECIPE:-scale/llama-1b}" --hosts-file "$HOSTS_FILE" "$@"
elif command -v sbatch >/dev/null; then
    exec bash "$folder/slurm_multi_node.sh" "$@"
else
    exec bash "$folder/multi_gpu.sh" "$@"
fi
