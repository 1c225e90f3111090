# Debian's packages, as root or by sudo, for the scripts that install what tests need. They read this file:
#
#     require_apt "The native fuzz targets need clang++" clang    # ends the script where it cannot be installed
#     apt_install clang

sudo=

require_apt() {
    why=$1
    shift
    if ! command -v apt-get > /dev/null; then
        echo "$why, and this system has no apt-get: install what Debian calls $* with its own package manager." >&2
        exit 1
    fi
    if [ "$(id -u)" != 0 ]; then
        if ! command -v sudo > /dev/null; then
            echo "Installing $* needs root: run 'apt-get install $*' as root, then this again." >&2
            exit 1
        fi
        sudo=sudo
    fi
    $sudo apt-get update
}

apt_install() {
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}
