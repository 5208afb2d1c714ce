#!/usr/bin/env bash
# Baseline: generate with alignment-handbook/zephyr-7b-dpo-full and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline zephyr-7b-dpo-full
