#!/usr/bin/env bash
# bash tests/benchmarks/gpu.sh          everything that needs a GPU, in at most nine minutes, without a network
# bash tests/benchmarks/gpu.sh --dry    the same commands on the CPU at toy sizes
#
# For one NVIDIA GPU with torch 2.11 or newer, pytest, and nvcc. CAMVID=FOLDER also trains on CamVid. Continues past failures
# and says at the end what failed. The results are in runs/gpu/results.md, to be put into tests/benchmarks/README.md as they are.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dry=${1:-} out=${OUT:-runs/gpu} python=${PYTHON:-python3} failed=()
results=$out/results.md data=$out/streets
mkdir -p "$out"

step() { # title, seconds at most, command: runs it, and adds its output, status and time to the results
  local title=$1 limit=$2 status start=$SECONDS
  shift 2
  timeout --kill-after 10 "$limit" "$@" >"$out/output.txt" 2>&1
  status=$?
  { echo; echo "### $title: status $status, $((SECONDS - start)) s"; echo; echo "    $*"; echo
    grep -v "^{" "$out/output.txt" | tail -n 30 | cut -c1-200 | sed 's/^/    /'; } >>"$results"
  echo "$title: status $status, $((SECONDS - start)) s"
  [ "$status" = 0 ] || failed+=("$title")
}

if [ "$dry" = --dry ]; then
  device=cpu sizes=(64 96) repeats=1 large=2 against=(eager) crop=(64 96) batch=2 steps=1 epochs=1 tests=(-k "not cuda" --collect-only) scenes=(--train 4 --val 4 --size 64 128)
else
  device=cuda sizes=(1024 2048) repeats=50 large=32 against=(max-autotune-bf16) crop=(512 1024) batch=32 steps=20 epochs=100 tests=(-k cuda) scenes=(--train 64 --val 8)
fi

{ echo "## $(date +%F) · GPU · $(git describe --always --dirty 2>/dev/null) · $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)"
  "$python" -c 'import torch; print(f"\ntorch {torch.__version__}, CUDA {torch.version.cuda}")'; } >"$results"

benchmark=("$python" tools/benchmark.py --device "$device" --repeats "$repeats")
[ -d "$data" ] || step "drawn scenes" 20 "$python" tools/streets.py "$data" "${scenes[@]}"
step "kernels are built" 60 "$python" -m ops_ext
step "tests of the kernels" 90 "$python" -m pytest -q tests/test_kernels.py tests/test_engine.py "${tests[@]}"
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null && [ "$dry" != --dry ]; then
    step "compute-sanitizer, $tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x \
      tests/test_kernels.py -k "cuda and random_cases"
  else
    printf '\n### compute-sanitizer, %s: not run\n' "$tool" >>"$results"
  fi
done
step "ops against plain PyTorch" 40 "$python" tests/benchmarks/ops.py --device "$device" --size "${sizes[@]}" --seconds "$([ "$dry" = --dry ] && echo 0 || echo 1)"
step "inference, batch 1" 90 "${benchmark[@]}" --size "${sizes[@]}" --against "${against[@]}"
step "inference, batch $large" 30 "${benchmark[@]}" --size "${sizes[@]}" --batch-size "$large"
step "training step" 60 "$python" tests/benchmarks/training.py --device "$device" --data "$data" --batch-size "$batch" \
  --crop-size "${crop[@]}" --steps "$steps" --amp bf16
if [ -n "${CAMVID:-}" ]; then
  step "CamVid, $epochs epochs" 60 "$python" train.py --recipe best --dataset camvid --data "$CAMVID" --device "$device" \
    --epochs "$epochs" --val-every "$epochs" --cache ram --workers 8 --out "$out/camvid"
fi

echo "results: $results"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" | tee -a "$results"
  exit 1
fi
