#!/bin/bash
# Measure what needs a GPU, in under nine minutes, most valuable parts first; no network.
#   bash benchmarks/gpu.sh [FOLDER FOR RESULTS [FOLDER OF SMOLLM2 [FOLDER OF ITS HEADS]]]
# SMOLLM2 and SMOLLM2_HEADS in the environment name the last two folders too. Every part is a process with a time limit of its
# own; it appends lines of JSON to a log as it measures, and does not stop the others. The exit code is 0 if all succeeded.
# SHAPE=tiny runs everything on a CPU, to see that it works; PARTS="env kernel" runs only these; LIMIT is for every part.
set -u
out=${1:-results-gpu}
export SMOLLM2=${2:-${SMOLLM2:-}} SMOLLM2_HEADS=${3:-${SMOLLM2_HEADS:-}}
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}
export PYTHONPATH="$root:$root/kernels:$root/training:$root/app${PYTHONPATH:+:$PYTHONPATH}" # from a checkout, nothing installed
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MEDHEAD_CACHE=${MEDHEAD_CACHE:-$(mktemp -d)}
parts=${PARTS:-env tests kernel step smollm2 train prefill bitwise compiled}
mkdir -p "$out"
bad=0
part() { # name, seconds, command
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    case " $parts " in *" $name "*) ;; *) return ;; esac
    limit=${LIMIT:-$limit}
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "== $name: exit code $code, $((SECONDS - began)) of $limit seconds"
    tail -n 3 "$out/$name.log" | cut -c1-300
    [ $code -eq 0 ] || bad=1
}
if [ "${SHAPE:-}" != tiny ] && ! nvidia-smi >/dev/null 2>&1; then
    echo "there is no GPU here; SHAPE=tiny runs all parts on a CPU"
    exit 2
fi
workers=$([ "${SHAPE:-}" = tiny ] || "$python" -c 'import xdist; print("-n 6")' 2>/dev/null)
part env 40 "$python" "$here/gpu/env.py"
# shellcheck disable=SC2086
part tests 100 "$python" -m pytest -q $workers "$root/tests/gpu" -m gpu -k "not compiled"
part kernel 70 "$python" "$here/gpu/kernel.py"
part step 80 "$python" "$here/gpu/step.py" graph
part smollm2 45 "$python" "$here/gpu/smollm2.py"
part train 65 "$python" "$here/gpu/train.py"
part prefill 35 "$python" "$here/gpu/prefill.py"
SHAPE=${SHAPE:-1b} part bitwise 30 "$python" "$here/gpu/bitwise.py"
SHAPE=${SHAPE:-1b} part compiled 60 "$python" "$here/gpu/step.py" compiled
exit $bad
