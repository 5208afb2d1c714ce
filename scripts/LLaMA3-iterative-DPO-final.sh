#!/usr/bin/env bash
# Baseline: generate with RLHFlow/LLaMA3-iterative-DPO-final and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline LLaMA3-iterative-DPO-final
