#!/usr/bin/env bash
# Runs what is too long for CI: every test at its full size, the wheel in empty environments, the oldest and newest
# versions, every command that is printed in README, the documentation and helps, the smoke runs of the three
# evaluations, damaged headers, the demo with its training, a race beside a grid. A step that fails does not stop the
# others; the summary names it, and the exit code is 1. WORK (default: a new folder in /tmp) keeps what the steps write,
# and STEPS is a regular expression for the names of the steps to run (default: all).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
work=${WORK:-$(mktemp -d)}
failed=() passed=()

step() { # NAME COMMAND…
    local name=$1 started=$SECONDS
    shift
    [[ $name =~ ${STEPS:-} ]] || return 0
    say "$name: $*"
    if "$@"; then passed+=("$name, $((SECONDS - started)) s"); else failed+=("$name, $((SECONDS - started)) s"); fi
}

make_environment # the commands below are its own; `tests/run.sh` adds what tests need
step "tests at full size" env EXPO_TEST_FULL=1 bash tests/run.sh
step "the wheel in an empty environment, by pip" bash tools/check_wheel.sh pip "$work"
step "the wheel in an empty environment, by uv" bash tools/check_wheel.sh uv "$work"
step "the oldest versions" env WORK="$work" bash tools/check_versions.sh oldest
step "the newest versions" env WORK="$work" bash tools/check_versions.sh newest
step "the commands that are printed" python tools/run_documents.py --all --work "$work/documents"
step "AlpacaEval" bash scripts/alpaca_eval.sh --smoke --output-dir "$work"
step "MT-Bench" bash scripts/mt_bench.sh --smoke --output-dir "$work"
step "Open LLM Leaderboard" bash scripts/open_llm_leaderboard.sh --smoke --output-dir "$work"
step "damaged headers" python benchmarks/fuzz_headers.py --count 100000 --keep "$work/fuzz-failures"
step "the demo" bash demo/run.sh "$work/demo"
step "a race beside a grid" python benchmarks/race.py engines --trio "$work/demo" --work "$work/race" \
    --sweep "--alpha 1 --alpha 2 --alpha 4 --alpha 8 --n 4"

say "$((${#passed[@]} + ${#failed[@]})) steps; what they wrote is in $work"
for name in ${passed[@]+"${passed[@]}"}; do echo "passed: $name"; done
for name in ${failed[@]+"${failed[@]}"}; do echo "FAILED: $name"; done
[ ${#failed[@]} = 0 ]
