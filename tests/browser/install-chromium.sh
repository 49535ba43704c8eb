#!/bin/sh
# Install Chromium for the page tests with the system's package manager.
set -eu
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
if command -v apt-get >/dev/null; then
    as_root apt-get update -qq
    as_root apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null
elif command -v dnf >/dev/null; then
    as_root dnf install -y -q chromium
elif command -v pacman >/dev/null; then
    as_root pacman -S --noconfirm --quiet chromium
elif command -v brew >/dev/null; then
    brew install --quiet --cask chromium
else
    echo "install Chromium or Google Chrome by hand, then run make test again" >&2
    exit 1
fi
