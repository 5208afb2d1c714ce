#!/usr/bin/env bash
# Builds the documentation into site/; with --serve, shows it on http://localhost:8000 and builds again what changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
make_environment
if ! has_modules zensical; then
    say "installing what builds the documentation"
    pip_install -e '.[docs]'
fi
python tools/make_reference.py
if [ "${1:-}" = --serve ]; then exec python -m zensical serve; fi
exec python -m zensical build --strict --clean
