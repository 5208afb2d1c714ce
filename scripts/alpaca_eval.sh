#!/usr/bin/env bash
# AlpacaEval 2.0 of DPO and θ(α), with the paper's judge or another one.
#   scripts/alpaca_eval.sh --smoke              tiny models, no network, no GPU; checks the scores
#   scripts/alpaca_eval.sh zephyr-7b-beta       a recipe; files go to the current folder
# What it needs is installed the first time. Rerunning continues. --help has the options and more examples.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"
evaluate alpaca vllm "$@"
