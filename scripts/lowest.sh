#!/usr/bin/env bash
# The quick tests with every dependency at the lowest version that pyproject.toml allows:
#     scripts/lowest.sh [ENV] [pytest options]
# Needs Python 3.11 and uv (`pip install uv`); ENV is where the environment is made, by default a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
env=${1:-$(mktemp -d)/env}
shift || true
uv venv -q --seed --python 3.11 "$env"
uv pip install -q --python "$env/bin/python" --resolution lowest-direct -e '.[test]'
"$env/bin/pip" check
"$env/bin/python" -m pytest "$@"
