#!/usr/bin/env bash
# Baseline: generate with berkeley-nest/Starling-LM-7B-alpha and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline Starling-LM-7B-alpha
