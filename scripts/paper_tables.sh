#!/usr/bin/env bash
# The paper's tables from the files that its authors released: paper_tables.sh FOLDER [--json | --markdown]
# What it needs is installed the first time, as by demo/run.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"
make_environment
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python -P -m evaluations.tables "$@"
