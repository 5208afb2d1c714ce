#!/usr/bin/env bash
# Baseline: generate with snorkelai/Snorkel-Mistral-PairRM-DPO and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline Snorkel-Mistral-PairRM-DPO
