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

. "$(dirname "$0")/../../tools/apt_install.sh"
require_apt "The NEON and AVX-512 tests need a compiler, an emulator and SIMDe" $packages
apt_install $packages
