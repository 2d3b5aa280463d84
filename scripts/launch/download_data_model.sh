#!/usr/bin/env bash
# Downloads a dataset and a model to datasets/ and models/, before a job on nodes that cannot reach the internet:
#
#   DATA="tinystories wikitext-103" MODEL=HuggingFaceTB/SmolLM2-135M bash scripts/launch/download_data_model.sh
#
# DATA and MODEL are lists of names; an empty one downloads nothing. Existing files are kept, and an interrupted
# download resumes. FORCE_REFRESH=1 compares all files with the hub and downloads those that differ. RECIPE=mine also makes
# the tokens of that recipe.
set -euo pipefail
source "$(dirname "$0")/activate.sh"
again=()
if [ "${FORCE_REFRESH:-0}" != 0 ]; then again=(--force); fi
for name in ${DATA-tinystories}; do shoal fetch data "$name" "${again[@]}"; done
for name in ${MODEL-HuggingFaceTB/SmolLM2-135M}; do shoal fetch model "$name" "${again[@]}"; done
if [ -n "${RECIPE:-}" ]; then shoal prepare "$RECIPE" "$@"; fi
