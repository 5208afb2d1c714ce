#!/usr/bin/env bash
# Baseline: generate with allenai/tulu-2-dpo-13b and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline tulu-2-dpo-13b
