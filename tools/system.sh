#!/bin/bash
# Makes sure of what the system has to provide: Debian packages, a Rust toolchain, a Python.
#
# Installs packages that are missing (as root, or through sudo). What it cannot install it names,
# with the command that does. Where nothing is missing it changes nothing and takes milliseconds.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(
  qemu-system-x86 qemu-utils # the VMM, its boot ROM, the disk tool
  busybox-static             # the programs of the tiny image
  mmdebstrap                 # the root file system of the image `python`
  e2fsprogs                  # mkfs.ext4 for the disk of a guest, e2fsck for the tests
  strace                     # the tests see by it that a guest's fsync is one
  gcc libc6-dev              # the linker and the C parts of Rust crates
  python3 python3-venv       # the control plane
)

missing_packages() {
  local installed
  installed=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "${PACKAGES[@]}" 2>/dev/null |
    sed -n 's/^ii *//p' || true)
  for package in "${PACKAGES[@]}"; do
    grep -qxF "$package" <<<"$installed" || echo "$package"
  done
}

# as_root COMMAND...: run it as root, or say what has to be run.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "setup: run this as root, then make again: $*" >&2
    exit 1
  fi
}

install_packages() {
  command -v dpkg-query >/dev/null || {
    echo "setup: this is not a Debian system; install by hand: ${PACKAGES[*]}" >&2
    exit 1
  }
  local missing
  mapfile -t missing < <(missing_packages)
  [ "${#missing[@]}" -gt 0 ] || return 0
  echo "setup: installing ${missing[*]}"
  local options=(-y -qq --no-install-recommends)
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "${missing[@]}")
  # The package lists may be absent or older than the archive: fetch them once, then try again.
  if ! apt-cache show "${missing[@]}" >/dev/null 2>&1 || ! as_root "${install[@]}" </dev/null; then
    as_root apt-get update -qq </dev/null
    as_root "${install[@]}" </dev/null
  fi
}

check_rust() {
  local needed found
  needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  found=$({ rustc --version 2>/dev/null || true; } | cut -d' ' -f2)
  if command -v cargo >/dev/null && [ -n "$found" ] && at_least "$found" "$needed"; then
    return 0
  fi
  {
    echo "setup: needs Rust $needed or newer, found ${found:-none}. This installs it:"
    echo "  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y"
    echo "(with rustup there already: rustup update stable)"
  } >&2
  exit 1
}

check_python() {
  "${DIAPAUSE_PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && return 0
  echo "setup: needs Python 3.11 or newer as python3, or named by DIAPAUSE_PYTHON" >&2
  exit 1
}

# at_least FOUND NEEDED
at_least() {
  [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

install_packages
check_rust
check_python
