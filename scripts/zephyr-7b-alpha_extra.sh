#!/usr/bin/env bash
# ExPO: extrapolate HuggingFaceH4/zephyr-7b-alpha from HuggingFaceH4/mistral-7b-sft-alpha, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra zephyr-7b-alpha
