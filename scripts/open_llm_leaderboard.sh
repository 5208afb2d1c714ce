#!/usr/bin/env bash
# The Open LLM Leaderboard's six tasks for DPO and θ(α), by lm-evaluation-harness and vLLM.
#   scripts/open_llm_leaderboard.sh --smoke              tiny models, no network, no GPU; checks the scores
#   scripts/open_llm_leaderboard.sh zephyr-7b-beta       a recipe; files go to the current folder
# What it needs is installed the first time. Rerunning leaves finished models alone; of one that was stopped it keeps the
# batches that were answered, and with the default --batch-size auto all log-likelihoods are one batch: a model stopped
# among them is evaluated from the beginning. --help has the options and more examples.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"
evaluate leaderboard vllm "$@"
