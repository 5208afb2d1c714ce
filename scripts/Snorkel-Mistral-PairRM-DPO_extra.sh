#!/usr/bin/env bash
# ExPO: extrapolate snorkelai/Snorkel-Mistral-PairRM-DPO from mistralai/Mistral-7B-Instruct-v0.2, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra Snorkel-Mistral-PairRM-DPO
