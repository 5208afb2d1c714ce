#!/usr/bin/env bash
# ExPO: extrapolate alignment-handbook/zephyr-7b-dpo-full from alignment-handbook/zephyr-7b-sft-full, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra zephyr-7b-dpo-full
