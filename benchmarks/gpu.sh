#!/bin/bash
# Run everything that needs a GPU within nine minutes: tests, kernels, whole steps, the demo model.
#   bash benchmarks/gpu.sh [FOLDER FOR RESULTS]
# Each part has a time limit of its own and does not stop the others; the exit code is 0 if all succeeded.
set -u
out=${1:-results-gpu}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/training:$root/app${PYTHONPATH:+:$PYTHONPATH}"  # from a checkout, nothing installed
mkdir -p "$out"
bad=0
part() { # name, seconds, command
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    tail -n 3 "$out/$name.log"
    [ $code -eq 0 ] || { echo "== $name ended with $code, see $out/$name.log"; bad=1; }
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/gpu.csv" 2>&1 || { echo "no GPU here"; exit 2; }
part tests 130 "$python" -m pytest -q -m gpu
part kernels 110 "$python" -m medhead_kernels.bench --output "$out/kernels"
part flex 30 "$python" -m medhead_kernels.bench --flex --contexts 2048 32768 --nodes 64 --groups 4 --batches 1 --output "$out/flex"
part step 130 "$python" -m medhead.cli.main bench step --shapes 1b 8b --nodes 16 64 --output "$out/step"
part compiled 60 "$python" -m medhead.cli.main bench step --shapes 1b --nodes 64 --steps compiled --heads recurrent --output "$out/compiled"
part demo 60 "$python" -m medhead.bench --num-prompts 4 --repeats 1 --steps graph --proposers hybrid --output "$out/demo"
exit $bad
