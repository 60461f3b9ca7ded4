#!/bin/bash
# Builds one of the parts that are Rust and puts it where the Python package looks for it.
#
# usage: native.sh agent|launch|pager|tracker|package
# agent: the guest's, static, since the guest has no libraries. launch: starts a VMM, static, since
# it does so where there are none. pager: serves memory to VMMs. tracker: preloaded into QEMU.
# package: diapause._core, and the package itself, editable, with .venv/bin/diapause.
set -euo pipefail
cd "$(dirname "$0")/.."

TARGET=x86_64-unknown-linux-gnu
NATIVE=src/diapause/native
target_dir=${CARGO_TARGET_DIR:-target}

# place SOURCE NAME: a running guest's VMM may have the old file mapped, so it is replaced whole.
place() {
  mkdir -p "$NATIVE"
  install -m 755 "$1" "$NATIVE/.$2.new"
  mv -f "$NATIVE/.$2.new" "$NATIVE/$2"
}

case "$1" in
agent | launch | pager)
  # The target is named so that the flag does not reach build scripts and macros.
  RUSTFLAGS='-C target-feature=+crt-static -C strip=debuginfo' \
    cargo build --locked --release -p "diapause-$1" --target "$TARGET"
  place "$target_dir/$TARGET/release/diapause-$1" "diapause-$1"
  ;;
tracker)
  cargo build --locked --release -p diapause-tracker
  place "$target_dir/release/libdiapause_tracker.so" libdiapause_tracker.so
  ;;
package)
  PIP_QUIET=1 VIRTUAL_ENV=$PWD/.venv .venv/bin/maturin develop --release --locked
  ;;
*)
  echo "usage: native.sh agent|launch|pager|tracker|package" >&2
  exit 2
  ;;
esac
