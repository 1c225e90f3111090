#!/bin/sh
# Installs what the NEON and AVX-512 tests need on a machine without these instructions: a compiler for aarch64, an
# emulator, and SIMDe. Does nothing where they are there already.
set -e

packages=
if [ "$(uname -m)" != aarch64 ]; then
    command -v aarch64-linux-gnu-g++ > /dev/null || packages="$packages g++-aarch64-linux-gnu"
    command -v qemu-aarch64-static > /dev/null || packages="$packages qemu-user-static"
fi
echo '#include <simde/x86/avx512.h>' | "${CXX:-c++}" -E -x c++ - > /dev/null 2>&1 || packages="$packages libsimde-dev"

if [ -z "$packages" ]; then
    exit 0
fi

if ! command -v apt-get > /dev/null; then
    echo "The NEON and AVX-512 tests need packages that Debian calls$packages, and this system has no apt-get: install" \
         "them with its own package manager." >&2
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

$sudo apt-get update
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
