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

. "$(dirname "$0")/../../tools/apt_install.sh"
require_apt "The native fuzz targets need clang++ with libFuzzer" clang
apt_install clang
# its runtime libraries: a package of their own since Debian 12, named by the version
version=$(clang --version | sed -n 's/.*version \([0-9]*\).*/\1/p;q')
works || apt_install "libclang-rt-$version-dev"
