#!/usr/bin/env bash
# ExPO: extrapolate Nexusflow/Starling-LM-7B-beta from openchat/openchat-3.5-0106, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra Starling-LM-7B-beta
