#!/usr/bin/env bash
# Fails where code is not formatted, ruff finds a mistake, or a cell or the README is too long. Then prepares a copy
# of the tree and compares: fails where stars/, README.md or a notebook is not what `make prepare` writes.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff format --quiet --diff || { echo "The lines above are not formatted: run make prepare." >&2; exit 1; }
.venv/bin/ruff check --quiet
.venv/bin/python benchmarks/book.py --check >/dev/null
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -R nbs stars settings.ini pyproject.toml README.md "$copy"
find "$copy/stars" -name "*.py" ! -name __init__.py -delete    # so a module without a notebook shows
(cd "$copy" && PATH="$OLDPWD/.venv/bin:$PATH" "$OLDPWD/.ci/prepare" >/dev/null)
for path in nbs stars README.md; do
    diff -r -u -x __pycache__ -x .ipynb_checkpoints -x .last_checked "$path" "$copy/$path" | cut -c1-200 || drifted=1
done
if [ "${drifted-}" ]; then echo "The lines above differ from what the notebooks produce: run make prepare." >&2; exit 1; fi
echo "stars/, README.md and the notebooks agree."
