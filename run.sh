#!/usr/bin/env bash
# bash run.sh                   set-up, then train on the default data, evaluate, write pictures and a page
# bash run.sh test [flags]      set-up, then the test suite (flags of pytest)
# bash run.sh train [flags]     set-up, then train.py on all devices of this machine; NPROC=n for n processes
# bash run.sh eval | predict | check | report | export | bench [flags]    set-up, then that script
#
# Paths in the flags are relative to the folder of this file. Set-up takes the active Python environment where it has what
# requirements.txt asks for, else it makes and fills .venv. --help after a command lists its flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

satisfies() { # python, requirements file: whether the packages are there, in these versions
  "$1" - "$2" <<'PY' 2>/dev/null
import re, sys
from importlib.metadata import version
from pathlib import Path
numbers = lambda text: [int(number) for number in re.findall(r"\d+", text)][:2]
for file in (sys.argv[1], "requirements.txt"):
    for name, least in re.findall(r"^([\w-]+)>=([\d.]+)", Path(file).read_text(), re.M):
        assert numbers(version(name)) >= numbers(least)
PY
}

set_up() { # requirements file; leaves the interpreter in $python
  python=$(command -v python3 || command -v python) || { echo "run.sh: no python3 on PATH; install Python 3.10 or newer" >&2; exit 2; }
  if satisfies "$python" "$1"; then return; fi
  local system=$python
  python=.venv/bin/python
  if satisfies "$python" "$1"; then return; fi
  if ! "$python" -m pip --version >/dev/null 2>&1; then # not there, or left half-made
    echo "run.sh: making .venv with $("$system" --version)"
    "$system" -m venv --clear .venv || { echo "run.sh: could not make .venv; on Debian and Ubuntu install python3-venv" >&2; exit 2; }
  fi
  echo "run.sh: installing $1 into .venv (torch is large: about two minutes on a fast network)"
  if ! "$python" -m pip install --quiet --disable-pip-version-check --requirement "$1"; then
    echo "run.sh: pip could not install $1 into .venv; see its message above, then run this again" >&2
    exit 2
  fi
}

train() { # flags of train.py; one process for each device
  local count=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.accelerator.device_count()))')}
  if [ "$count" = 1 ]; then
    "$python" train.py "$@"
  else
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$count" train.py "$@"
  fi
}

main_job() {
  local data=datasets/cityscapes out=runs flags=()
  if [ ! -d "$data" ]; then
    echo "run.sh: no datasets/cityscapes here: using drawn street scenes"
    data=datasets/streets out=runs/streets NPROC=${NPROC:-1}
    flags=(--epochs 12 --batch-size 4 --base-lr 0.135 --crop-size 256 512 --scale-range 0.75 1.75 --val-every 4)
    [ -d "$data" ] || "$python" tools/streets.py "$data"
  fi
  train --data "$data" --out "$out" --resume auto ${flags[@]+"${flags[@]}"}
  local weights=$out/checkpoints/best_model.pth
  "$python" eval.py --weights "$weights" --data "$data" --sheet "$out/sheet.png"
  "$python" tools/report.py --weights "$weights" --data "$data" --out "$out/report.html"
  cat <<TEXT

written: $weights, the best network by validation mIoU
         $out/logs/train.log, the lines of the training; metrics.jsonl beside it for programs
         $out/sheet.png, image | truth | prediction
         $out/report.html, curves, figures, confusion matrix and the worst images; open it in a browser
next:    bash run.sh eval --weights $weights --data $data
         bash run.sh predict PHOTOS --weights weights/camvid.pth   (your own street photos, into runs/predictions)
         bash run.sh train --recipe best --dataset folder --data MINE   (your own data; README.md says how to lay it out)
TEXT
}

command=${1:-main}
[ $# -eq 0 ] || shift
case $command in
  main) set_up requirements.txt; "$python" -m ops_ext || true; main_job ;;
  test) set_up tests/requirements.txt; "$python" -m ops_ext || true; "$python" -m pytest tests -n 2 "$@" ;;
  train) set_up requirements.txt; train "$@" ;;
  eval) set_up requirements.txt; "$python" eval.py "$@" ;;
  predict | check | report | export) set_up requirements.txt; "$python" "tools/$command.py" "$@" ;;
  bench) set_up requirements.txt; "$python" tools/benchmark.py "$@" ;;
  *) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; [ "$command" = help ] || { echo "run.sh: no command '$command'" >&2; exit 2; } ;;
esac
