#!/bin/sh
# Installs headless Chromium and its driver, for tests/test_server_page.py. Does nothing where they are there already.
set -e

works() {
    command -v chromedriver > /dev/null && command -v chromium > /dev/null &&
        timeout 60 chromium --headless --no-sandbox --disable-gpu --dump-dom 'data:text/html,<p>works' 2> /dev/null | grep -q works
}

if works; then
    exit 0
fi

if ! command -v apt-get > /dev/null; then
    echo "The tests of the page need chromium and chromedriver, and this system has no apt-get: install them with its own" \
         "package manager." >&2
    exit 1
fi

sudo=
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo > /dev/null; then
        echo "Installing chromium needs root: run 'apt-get install chromium chromium-driver' as root, then this again." >&2
        exit 1
    fi
    sudo=sudo
fi

$sudo apt-get update
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core
works
