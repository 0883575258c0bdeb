#!/usr/bin/env bash
# Everything that needs a GPU, in one run of about 6 minutes: the kernels' tests on the card, runs that are killed and
# resumed to the bit, the step against the published one, the paper's sweep, and a profile.
#     bash benchmarks/gpu.sh [FOLDER]      writes what it prints to FOLDER (default: runs/gpu), a file each
# Exit code 1 if any of them failed.
set -u
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu}
mkdir -p "$folder"
rm -f "$folder"/*.txt
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$folder/card.txt"
run() {
    local started=$SECONDS
    timeout 300 "${@:2}" >"$folder/$1.txt" 2>&1
    echo "exit code $? after $((SECONDS - started)) s" >>"$folder/$1.txt"  # read at the end
    echo "+ ${*:2}"
    tail -n 60 "$folder/$1.txt"
}
run tests python -m pytest -q -n 8 tests/test_triton_ops.py tests/test_distributed.py::test_nccl_gives_the_bits_of_one_process &
few=(dict_size=1024 top_k=8 l1_coeff=0.01)  # one SAE of each type
run resume python tests/kill_and_resume.py --kills 1 --others 0 "${few[@]}"
gpus=$(nvidia-smi -L | wc -l)
if [ "$gpus" -gt 1 ]; then  # under torchrun with one rank per GPU, killed and compared with a single process
    run ranks python tests/kill_and_resume.py --kills 1 --others 1 --ranks "$gpus" "${few[@]}"
fi
wait  # for the tests: nothing else may run while times are measured
run step python benchmarks/step.py --rounds 3 --json "$folder/step.json"
run sweep python benchmarks/sweep.py --only gpt2 --dead-after 1000
run profile python benchmarks/profile_step.py
! grep -H "^exit code [^0]" "$folder"/*.txt
