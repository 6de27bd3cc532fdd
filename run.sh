#!/usr/bin/env bash
# bash run.sh                   set-up, then train on the default data, evaluate, write pictures
# bash run.sh test [flags]      set-up, then the test suite (flags of pytest)
# bash run.sh train [flags]     set-up, then train.py on all devices of this machine; NPROC=n for n processes
# bash run.sh eval [flags]      set-up, then eval.py
# bash run.sh bench [flags]     set-up, then eval.py --benchmark
# bash run.sh help              this; for the flags: bash run.sh train --help, bash run.sh eval --help
#
# Paths in the flags are relative to the folder of this file, wherever it is called from; give others in full.
# Set-up takes the active Python environment where it has what requirements.txt asks for, else it makes and fills .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Without --no-index this would reach for the network; with it, it fails where something is missing.
satisfies() {
  "$1" -m pip install --quiet --dry-run --no-index --requirement "$2" >/dev/null 2>&1 \
    && "$1" -c 'import torch, torchvision' >/dev/null 2>&1
}

usage() { # the comment at the head of this file
  sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"
}

set_up() { # requirements file; leaves the interpreter in $python
  python=$(command -v python3 || command -v python || true)
  if [ -z "$python" ]; then
    echo "run.sh: no python3 on PATH; install Python 3.10 or newer" >&2
    exit 2
  fi
  if satisfies "$python" "$1"; then return; fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # not there, or left half-made
    echo "run.sh: making .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv; then
      echo "run.sh: could not make .venv; on Debian and Ubuntu install python3-venv" >&2
      exit 2
    fi
  fi
  python=.venv/bin/python
  local stamp
  stamp=.venv/installed-$(cat requirements.txt "$1" | cksum | tr ' ' '-')
  if [ -e "$stamp" ]; then return; fi
  echo "run.sh: installing $1 into .venv (torch is large: about two minutes on a fast network)"
  if ! "$python" -m pip install --quiet --disable-pip-version-check --requirement "$1"; then
    echo "run.sh: pip could not install $1 into .venv; see its message above, then run this again" >&2
    exit 2
  fi
  touch "$stamp"
}

build_ops() { # compiles the kernels of ops_ext unless that is done; where it fails they run in plain PyTorch
  "$python" -m ops_ext || true
}

devices() { # how many accelerators there are, at least 1
  "$python" -c 'import torch; print(max(1, torch.accelerator.device_count()))'
}

train() { # flags of train.py; one process for each device
  local count
  count=${NPROC:-$(devices)}
  if [ "$count" = 1 ]; then
    "$python" train.py "$@"
  else
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$count" train.py "$@"
  fi
}

main_job() {
  local data=datasets/cityscapes out=runs flags=() photos=runs/checkpoints/best_model.pth more="--dataset camvid"
  if [ -d "$data" ]; then
    if [ -z "${NPROC:-}" ]; then # as many processes as share the default batch of 16 evenly
      NPROC=$(devices)
      while ((16 % NPROC)); do NPROC=$((NPROC - 1)); done
    fi
  else
    data=datasets/streets out=runs/streets photos=weights/camvid.pth more="--data datasets/cityscapes"
    echo "run.sh: no datasets/cityscapes here: taking drawn street scenes"
    [ -d "$data" ] || "$python" tests/streets.py "$data"
    NPROC=${NPROC:-1}
    flags=(--epochs 12 --batch-size 4 --base-lr 0.135 --crop-size 256 512 --scale-range 0.75 1.75 --val-every 4)
  fi
  train --data "$data" --out "$out" --resume auto ${flags[@]+"${flags[@]}"}
  local weights=$out/checkpoints/best_model.pth
  "$python" eval.py --weights "$weights" --data "$data" --sheet "$out/sheet.png" --report "$out/report.html"
  cat <<TEXT

written: $weights, the best network by validation mIoU
         $out/logs/train.log, the lines of the training; metrics.jsonl beside it for programs
         $out/sheet.png, image | truth | prediction
         $out/report.html, curves, figures, confusion matrix and the worst images; open it in a browser
next:    bash run.sh eval --weights $weights --data $data
         bash run.sh eval --weights $photos --predict PHOTOS   (your own street photos, into runs/predictions)
         bash run.sh train $more   (README.md, Data, says how to get the data)
TEXT
}

command=${1:-main}
[ $# -eq 0 ] || shift
case $command in
  help | -h | --help) usage ;;
  main) set_up requirements.txt; build_ops; main_job ;;
  test) set_up tests/requirements.txt; build_ops; "$python" -m pytest tests "$@" ;;
  train) set_up requirements.txt; build_ops; train "$@" ;;
  eval) set_up requirements.txt; build_ops; "$python" eval.py "$@" ;;
  bench) set_up requirements.txt; build_ops; "$python" eval.py --benchmark "$@" ;;
  *) usage >&2; echo "run.sh: no command '$command', expected one of those above" >&2; exit 2 ;;
esac
