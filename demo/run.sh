#!/usr/bin/env bash
# Makes an environment, trains a tiny SFT/DPO/reward trio, and sweeps α.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
make_environment
export OMP_NUM_THREADS=1 # these models are too small for more
exec python -m demo.run "$@"
