#!/bin/sh
# Installs the Debian packages of a list (default: what Open3D's wheel links to), where any is missing.
set -eu
here=$(dirname "$0")
wanted=$(cat "${1:-$here/apt-packages.txt}")
python3 -c 'import ensurepip, venv' 2>/dev/null || wanted="$wanted python3-venv"
command -v dpkg-query >/dev/null || { echo "not Debian: install the equivalents of: $wanted" >&2; exit 0; }

missing=""
for package in $wanted; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -q '^installed$' \
        || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "system packages are missing; run: sudo apt-get install$missing" >&2
    exit 1
fi
