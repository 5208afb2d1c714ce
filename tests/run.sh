#!/usr/bin/env bash
# Makes an environment and runs every check and test in it; further words go to pytest (-n0: one test after another).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh

# The report's tests drive a browser. It is installed while pip is at work; without one they skip.
has_browser() { [ -n "${EXPO_TEST_CHROMIUM:-}" ] || command -v chromium chromium-browser google-chrome >/dev/null; }
browser=
if ! has_browser && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing chromium in the background"
    (
        export DEBIAN_FRONTEND=noninteractive
        timeout 900 apt-get -qq update && timeout 900 apt-get -qq install -y --no-install-recommends chromium
    ) >/dev/null 2>&1 &
    browser=$!
fi
# So is FastChat's environment, which is another one, for the full check; without it the test of its judge skips.
fastchat=
if [ "${EXPO_TEST_FULL:-}" = 1 ]; then
    make_fastchat >/dev/null 2>&1 &
    fastchat=$!
fi
make_environment

if ! has_modules pytest xdist hypothesis ruff mypy importlinter openai peft alpaca_eval lm_eval playwright statsmodels ville nbclient ipykernel hatchling zensical ray; then
    say "installing the tools that check the code"
    take_pip_settings
    pip_install -e '.[test]'
fi
if ! has_modules vllm; then install_vllm; fi

export OMP_NUM_THREADS=1 # tiny models: more threads only wait for each other
python -m tests.made_inputs & # a trained trio; takes a core for some seconds, and the checks take the other
inputs=$!
say "lint, format, types, layers"
ruff check .
ruff format --check .
mypy
lint-imports
wait "$inputs"
if [ -n "$fastchat" ]; then
    wait "$fastchat" || say "FastChat could not be installed (bash scripts/mt_bench.sh --smoke shows why): its test skips"
fi
if [ -n "$browser" ]; then wait "$browser" || true; fi
has_browser || say "no chromium here, and none could be installed: the tests of the report in a browser skip"
say "tests"
exec python -m pytest -n logical --maxprocesses 8 --dist loadgroup --durations 10 "$@"
