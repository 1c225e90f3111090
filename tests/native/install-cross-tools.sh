#!/bin/sh
# Installs what the NEON and AVX-512 tests need on a machine without these instructions: a compiler for aarch64, an
# emulator, and SIMDe. Does nothing where they are there already.
set -e

if [ "$(uname -m)" = aarch64 ] || { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static; } > /dev/null; then
    exit 0
fi

packages="g++-aarch64-linux-gnu qemu-user-static libsimde-dev"

if ! command -v apt-get > /dev/null; then
    echo "The NEON test needs aarch64-linux-gnu-g++ and qemu-aarch64-static, and this system has no apt-get: install them" \
         "with its own package manager (Debian calls the packages $packages)." >&2
    exit 1
fi

sudo=
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo > /dev/null; then
        echo "Installing $packages needs root: run 'apt-get install $packages' as root, then this again." >&2
        exit 1
    fi
    sudo=sudo
fi

$sudo apt-get update
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
