#!/bin/bash
# Resolves requirements/*.lock anew from pyproject.toml. Run by hand when a dependency moves.
#
# The locks hold for every supported Python and carry digests, and no address: pip takes the files
# from wherever the machine is configured to take them.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet uv

compile() {
  "$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-header --no-annotate --upgrade "$@"
}

compile pyproject.toml -o requirements/run.lock
sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml | compile - -o requirements/build.lock
compile pyproject.toml --extra dev -c requirements/run.lock -c requirements/build.lock \
  -o requirements/dev.lock
