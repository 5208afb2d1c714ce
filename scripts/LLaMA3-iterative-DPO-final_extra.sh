#!/usr/bin/env bash
# ExPO: extrapolate RLHFlow/LLaMA3-iterative-DPO-final from RLHFlow/LLaMA3-SFT, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra LLaMA3-iterative-DPO-final
