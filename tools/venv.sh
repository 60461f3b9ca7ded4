#!/bin/bash
# Installs locked requirements into .venv, which it makes where there is none.
#
# usage: venv.sh LOCK...
# Every file is checked against the digests in the lock; nothing that is not locked gets in.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  rm -rf .venv
  "${DIAPAUSE_PYTHON:-python3}" -m venv .venv
fi

requirements=()
for lock in "$@"; do
  requirements+=(-r "$lock")
done
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
  --require-hashes --no-deps --only-binary :all: "${requirements[@]}"
