#!/usr/bin/env bash
# Install Chromium for the tests of the page, if it is missing. Needs root and apt-get (Debian, Ubuntu); else it says what to do.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" > /dev/null; then
        echo "setup: the tests of the page use $(command -v "$name")"
        exit 0
    fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "setup: no Chromium was found, and only root on Debian can install it here: install the package chromium" >&2
    exit 1
fi
echo "setup: installing Chromium with apt-get for the tests of the page (about a minute)"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null
echo "setup: the tests of the page use $(command -v chromium)"
