#!/usr/bin/env bash
# Baseline: generate with internlm/internlm2-chat-1_8b and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
baseline internlm2-chat-1_8b
