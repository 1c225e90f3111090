#!/bin/sh
# Installs clang with libFuzzer, for `make fuzz`. Does nothing where it is there already.
set -e

works() {
    command -v clang++ > /dev/null && echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char *, unsigned long) { return 0; }' |
        clang++ -fsanitize=fuzzer,address -x c++ - -o /dev/null 2> /dev/null
}

if works; then
    exit 0
fi

if ! command -v apt-get > /dev/null; then
    echo "The native fuzz targets need clang++ with libFuzzer, and this system has no apt-get: install them with its own" \
         "package manager." >&2
    exit 1
fi

sudo=
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo > /dev/null; then
        echo "Installing clang needs root: run 'apt-get install clang' as root, then this again." >&2
        exit 1
    fi
    sudo=sudo
fi

install() {
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

$sudo apt-get update
install clang
# its runtime libraries: a package of their own since Debian 12, named by the version
version=$(clang --version | sed -n 's/.*version \([0-9]*\).*/\1/p;q')
works || install "libclang-rt-$version-dev"
