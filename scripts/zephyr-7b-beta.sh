#!/usr/bin/env bash
# Baseline: generate with HuggingFaceH4/zephyr-7b-beta and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline zephyr-7b-beta
