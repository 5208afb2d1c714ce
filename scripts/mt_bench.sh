#!/usr/bin/env bash
# MT-Bench of DPO and θ(α), judged by FastChat, which gets an environment of its own.
#   scripts/mt_bench.sh --smoke              tiny models, no network, no GPU; checks the scores
#   scripts/mt_bench.sh zephyr-7b-beta       a recipe; files go to the current folder
# What it needs is installed the first time. Rerunning continues. --help has the options and more examples.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"
evaluate mt_bench fastchat,vllm "$@"
