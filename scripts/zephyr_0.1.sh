#!/usr/bin/env bash
# Baseline: generate with chujiezheng/zephyr_0.1 and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline zephyr_0.1
