#!/usr/bin/env bash
# Everything that needs a GPU: tests, learner, routing, task sampling cost, profiles, and complete training runs.
#   benchmarks/gpu.sh [FOLDER]     results and logs go to FOLDER; PYTHON=... chooses another interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
failed=0
step() {
  local name=$1
  shift
  SECONDS=0
  "$@" >"$out/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code after ${SECONDS} s"
  ((code == 0)) || failed=1
}
step tests "$python" -m pytest -q tests/test_cuda.py tests/test_training.py -k "cuda"
step learner "$python" benchmarks/learner.py --rounds 3 --json "$out/learner.json"
step routing "$python" benchmarks/routing.py --json "$out/routing.json"
step task_sampling_cost "$python" benchmarks/task_sampling_cost.py --rounds 10 \
  --flags="--precision bf16 --compile on --cuda-graphs" --json "$out/task_sampling_cost.json"
step profile "$python" -m mtrl_vec profile --preset gpu --run-dir "$out/profile" --overwrite --json "$out/profile.json"
step profile-overlap "$python" -m mtrl_vec profile --preset gpu --overlap --run-dir "$out/profile-overlap" --overwrite \
  --json "$out/profile-overlap.json"
step train "$python" -m mtrl_vec train --preset gpu --run-dir "$out/train" --overwrite
step eval "$python" -m mtrl_vec eval "$out/train" --json "$out/eval.json"
step train-overlap "$python" -m mtrl_vec train --preset gpu --overlap --run-dir "$out/train-overlap" --overwrite
step eval-overlap "$python" -m mtrl_vec eval "$out/train-overlap" --json "$out/eval-overlap.json"
tail -n 25 "$out"/{tests,learner,routing,task_sampling_cost,profile,profile-overlap,train,eval,train-overlap,eval-overlap}.log
exit $failed
