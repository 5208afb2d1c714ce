#!/usr/bin/env bash
# ExPO: extrapolate allenai/tulu-2-dpo-70b from allenai/tulu-2-70b, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra tulu-2-dpo-70b
