#!/usr/bin/env bash
# Sourced by the other scripts of this folder: puts shoal on the path, from this repository's .venv if there is one.
# The working folder is not changed: data/, datasets/ and runs/ are where a script was started.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -x "$here/.venv/bin/shoal" ]; then PATH=$here/.venv/bin:$PATH; fi
command -v shoal >/dev/null || {
    echo "shoal is not installed; run bash $here/scripts/setup/install_dependencies.sh" >&2
    exit 2
}
