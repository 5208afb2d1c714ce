#!/usr/bin/env bash
# ExPO: extrapolate chujiezheng/zephyr_0.1 from alignment-handbook/zephyr-7b-sft-full, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra zephyr_0.1
