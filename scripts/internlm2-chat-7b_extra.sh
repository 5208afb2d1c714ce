#!/usr/bin/env bash
# ExPO: extrapolate internlm/internlm2-chat-7b from internlm/internlm2-chat-7b-sft, generate and score.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extra internlm2-chat-7b
