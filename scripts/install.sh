#!/usr/bin/env bash
# Makes .venv with the pinned versions of constraints.txt and shoal itself, editable.
#
#   PYTHON=python3.12        Python to use, 3.11 to 3.13 (default: the first one found)
#   TORCH_WHEELS=DIR_OR_URL  additional place to look for torch's wheels
#   VENV=DIR                 folder of the environment (default: .venv)
#   TORCH_VERSION=2.11.0     version of torch instead of the pinned one; if it has no CPU build, its CUDA build is installed
#
# On Linux without an NVIDIA GPU it installs torch's CPU build: the one that pip finds, or else the one that uv
# finds (--torch-backend=cpu). It never installs the pinned version's CUDA build there: several unneeded gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }
fits() { "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if fits "$candidate"; then echo "$candidate"; return; fi
    done
    fail "no Python 3.11 to 3.13 with venv was found; install one, or set PYTHON=/path/to/python"
}

without_gpu() { [ "$(uname -s)" = Linux ] && ! { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || command -v nvidia-smi >/dev/null; }; }

# Print the URL of the wheel that pip would install for torch, without installing it.
wheel_of_torch() {
    "$pip" install --dry-run -qq --no-deps --ignore-installed --report - "${wheels[@]}" "$torch" 2>/dev/null |
        "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["download_info"]["url"])' 2>/dev/null || true
}

install_torch() {
    if without_gpu && ! wheel_of_torch | grep -qE '(\+|%2B)cpu'; then
        say "pip would take the CUDA build of torch; asking uv for the CPU build"
        "$pip" install -qq uv
        if "$venv/bin/uv" pip install -qq --python "$venv/bin/python" --torch-backend=cpu "$torch"; then return; fi
        [ -n "${TORCH_VERSION:-}" ] ||
            fail "no CPU build of $torch was found; set TORCH_WHEELS to a folder or an index that has one"
        say "no CPU build of $torch was found; taking the CUDA build, several gigabytes"
    fi
    "$pip" install -qq "${wheels[@]}" --constraint "$constraints" "$torch"
}

python=$(find_python)
venv=${VENV:-.venv}
pip=$venv/bin/pip
torch=torch==${TORCH_VERSION:-$(sed -n 's/^torch==//p' constraints.txt)}
wheels=()
if [ -n "${TORCH_WHEELS:-}" ]; then wheels=(--find-links "$TORCH_WHEELS" --extra-index-url "$TORCH_WHEELS"); fi
export PIP_DISABLE_PIP_VERSION_CHECK=1

say "$("$python" --version) from $(command -v "$python"), into $venv"
if ! { [ -x "$venv/bin/python" ] && fits "$venv/bin/python"; }; then "$python" -m venv --clear "$venv"; fi
constraints=constraints.txt
if [ -n "${TORCH_VERSION:-}" ]; then
    constraints=$venv/constraints.txt
    sed "s/^torch==.*/$torch/" constraints.txt >"$constraints"
fi
say "1/3 finding and installing $torch (some 200 MB for a CPU, more for CUDA; half a minute or longer)"
install_torch
say "2/3 installing the other pinned versions (one to two minutes; pip prints nothing)"
"$pip" install -qq --requirement "$constraints" --constraint "$constraints"
say "3/3 shoal itself"
"$pip" install -qq --no-deps --no-build-isolation --editable .
if [ -z "${TORCH_VERSION:-}" ] && without_gpu && "$pip" list 2>/dev/null | grep -qi '^nvidia-'; then
    fail "CUDA packages were installed on a machine without a GPU"
fi
touch "$venv/installed"
say "done; 'source $venv/bin/activate' puts shoal on your path"
