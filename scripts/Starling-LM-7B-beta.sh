#!/usr/bin/env bash
# Baseline: generate with Nexusflow/Starling-LM-7B-beta and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline Starling-LM-7B-beta
