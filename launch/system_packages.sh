#!/usr/bin/env bash
# Installs the Debian packages that some tests need, where this may be done (as root); without them
# these tests are skipped with a message.
set -euo pipefail
packages=(
  chromium # screenshots of the HTML report
  iproute2 # two machines made of network namespaces
  openssh-server
  pdsh
)
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
  echo "not installed (needs root and apt-get): ${packages[*]}"
  exit 0
fi
missing=()
for package in "${packages[@]}"; do
  dpkg -s "$package" > /dev/null 2>&1 || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
