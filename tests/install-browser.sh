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

. "$(dirname "$0")/../tools/apt_install.sh"
require_apt "The tests of the page need chromium and chromedriver" chromium chromium-driver
apt_install chromium chromium-driver fonts-dejavu-core
works
