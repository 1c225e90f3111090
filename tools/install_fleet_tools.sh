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

. "$(dirname "$0")/apt_install.sh"
require_apt "The tests of a fleet need PostgreSQL and HAProxy" $packages
# no cluster of the system: the tests make their own
$sudo mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] ||
    echo "create_main_cluster = false" | $sudo tee /etc/postgresql-common/createcluster.conf > /dev/null
apt_install $packages
if command -v systemctl > /dev/null && [ "${packages#*haproxy}" != "$packages" ]; then
    $sudo systemctl disable --now haproxy > /dev/null 2>&1 || true
fi
