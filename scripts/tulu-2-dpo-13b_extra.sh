#!/usr/bin/env bash
# ExPO: extrapolate allenai/tulu-2-dpo-13b from allenai/tulu-2-13b, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra tulu-2-dpo-13b
