#!/usr/bin/env bash
# Everything that needs a GPU, in one run of about 8 minutes: the kernels' tests on the card, a run that is killed and
# resumed to the bit, the step against the published one, and a profile.
#     bash benchmarks/gpu.sh [FOLDER]      writes what it prints to FOLDER (default: runs/gpu), a file each
set -u
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu}
mkdir -p "$folder"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$folder/card.txt"
run() {
    echo "+ ${*:2}"
    timeout 200 "${@:2}" 2>&1 | tee "$folder/$1.txt" | tail -n 40
}
run tests python -m pytest -q -n 0 tests/test_triton_ops.py
run resume python tests/kill_and_resume.py --kills 3 --others 0
run step python benchmarks/step.py --rounds 5 --json "$folder/step.json"
run profile python benchmarks/profile_step.py
