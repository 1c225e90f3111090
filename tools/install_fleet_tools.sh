#!/bin/sh
# Installs what the tests of a fleet start: PostgreSQL and HAProxy, as Debian packages. Neither is started, nor started
# with the machine. Does nothing where they are there already.
set -e

packages=
ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || command -v initdb > /dev/null || packages="$packages postgresql"
PATH="$PATH:/usr/sbin" command -v haproxy > /dev/null || packages="$packages haproxy"

if [ -z "$packages" ]; then
    exit 0
fi

if ! command -v apt-get > /dev/null; then
    echo "The tests of a fleet need what Debian calls$packages, and this system has no apt-get: install it with its own" \
         "package manager." >&2
    exit 1
fi

sudo=
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo > /dev/null; then
        echo "Installing$packages needs root: run 'apt-get install$packages' as root, then this again." >&2
        exit 1
    fi
    sudo=sudo
fi

# no cluster of the system: the tests make their own
$sudo mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] ||
    echo "create_main_cluster = false" | $sudo tee /etc/postgresql-common/createcluster.conf > /dev/null
$sudo apt-get update
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
if command -v systemctl > /dev/null && [ "${packages#*haproxy}" != "$packages" ]; then
    $sudo systemctl disable --now haproxy > /dev/null 2>&1 || true
fi
