#!/usr/bin/env bash
# ExPO: extrapolate HuggingFaceH4/zephyr-7b-beta from HuggingFaceH4/mistral-7b-sft-beta, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra zephyr-7b-beta
