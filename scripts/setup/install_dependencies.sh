#!/usr/bin/env bash
# Installs what shoal needs on a new machine: git, make and Python from the system's packages if they are missing, then
# shoal with its pinned versions, into .venv of this repository or into the active conda environment. No arguments.
#
#   FORCE_REFRESH=1    make .venv again from scratch
#   PYTHON, TORCH_WHEELS, TORCH_VERSION    see scripts/install.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "$#" -gt 0 ]; then sed -n '2,/^set/{/^#/p}' scripts/setup/install_dependencies.sh; exit 2; fi

say() { printf 'install: %s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 2; }
has_python() {
    local python
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        "$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null &&
            return
    done
    return 1
}

install_packages() {
    local root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null ||
            fail "missing: $*; ask an administrator to install them, or activate a conda environment that has them"
        root=(sudo)
    fi
    say "installing $* from the system's packages"
    if command -v apt-get >/dev/null; then
        "${root[@]}" apt-get update -qq
        "${root[@]}" apt-get install --yes -qq --no-install-recommends "$@" >/dev/null
    elif command -v dnf >/dev/null; then
        "${root[@]}" dnf install --assumeyes --quiet "${@/python3-venv/python3}"
    else
        fail "missing: $*; install them with this system's package manager"
    fi
}

missing=()
for tool in git make; do command -v "$tool" >/dev/null || missing+=("$tool"); done
if [ -z "${CONDA_PREFIX:-}" ] && ! has_python; then missing+=(python3 python3-venv); fi
if [ "${#missing[@]}" -gt 0 ]; then install_packages "${missing[@]}"; fi

if [ -n "${CONDA_PREFIX:-}" ]; then
    say "into the active conda environment $CONDA_PREFIX"
    python -m pip install -q --constraint constraints.txt --editable .
else
    if [ "${FORCE_REFRESH:-0}" != 0 ]; then make clean; fi
    make setup
fi
