#!/usr/bin/env bash
# Installs shoal, makes the project's folders on the shared disk, and checks every node:
#
#   SHARED=/shared/$USER PROJECT=gpt2 bash scripts/launch/setup.sh [--hosts node0,node1]
set -euo pipefail
bash "$(dirname "$0")/../setup/install_dependencies.sh"
source "$(dirname "$0")/activate.sh"
exec shoal setup --shared "${SHARED:-$PWD}" --project "${PROJECT:-shoal}" "$@"
