#!/usr/bin/env bash
# ExPO: extrapolate berkeley-nest/Starling-LM-7B-alpha from openchat/openchat_3.5, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra Starling-LM-7B-alpha
