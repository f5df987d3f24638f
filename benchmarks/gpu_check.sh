#!/usr/bin/env bash
# What a CUDA GPU must show, in stages of less than nine minutes:
#
#   benchmarks/gpu_check.sh OUTDIR                  correct and speed, half of the time each
#   benchmarks/gpu_check.sh OUTDIR all              correct and speed at once, then traffic and kernels
#   benchmarks/gpu_check.sh OUTDIR correct          every step and net against float64
#   benchmarks/gpu_check.sh OUTDIR speed            beside plain PyTorch, tuned, captured, compiled
#   benchmarks/gpu_check.sh OUTDIR profile          the kernels that steps spend their time in
#   benchmarks/gpu_check.sh OUTDIR kernels          each kernel of a step, beside its memory traffic
#   benchmarks/gpu_check.sh OUTDIR traffic          bytes moved: by ncu, or without a GPU by account
#   benchmarks/gpu_check.sh OUTDIR tune             tiles and warps, for the tables in the kernels
#   benchmarks/gpu_check.sh OUTDIR chapter          densely train --recipe d2l, everything included
#   benchmarks/gpu_check.sh OUTDIR cifar            densely train --recipe cifar: 300 epochs
#
# Words behind the stage go to it, such as --budget SECONDS, --nets d2l,bc,121, --dtypes bfloat16,
# --compile default (or '' for none), --variants "densely captured,compiled default captured",
# --train "--batch-size 256 --lr 0.4" (more words for densely train in chapter and cifar), and
# --smoke: a dry run of tiny nets on a CPU.
#
# PYTHON      the Python with PyTorch and Triton (python3); nothing of densely need be installed
# WHEELS      chapter, cifar: folder with wheels of jsonargparse and rich and what they need, if
#             missing
# COMMIT      what is checked, where the checkout has come without its history
# DENSELY_DATA  chapter, cifar: the folder that holds fashion-mnist/, and cifar10/ or cifar10*.tar*
#
# cifar stops and saves where its time is over; the same command with the same OUTDIR goes on.
#
# Every finding is written to OUTDIR at once, so that a run that is cut off still counts.
# Exit code: 0 fine, 1 something is wrong or was left out for want of time, 2 usage.
set -euo pipefail

usage() {
  sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
stage=both
if [ $# -ge 1 ] && [ "${1#-}" = "$1" ]; then
  stage=$1
  shift
fi

here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../src:$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

# run STAGE SECONDS [OPTIONS]: the stage itself keeps to its budget, SECONDS or what --budget says;
# timeout stops one that hangs.
run() {
  local name=$1 seconds=$2 before=
  shift 2
  for word in "$@"; do
    case $before$word in
      --budget[0-9]*) seconds=${word%.*} ;;
      *--budget=*) seconds=${word#--budget=} seconds=${seconds%.*} ;;
    esac
    before=$word
  done
  timeout --kill-after 10 $((seconds + 45)) \
    "$python" -m gpu_check "$name" "$out" --budget "$seconds" "$@" 2>&1 | tee -a "$out/log.txt"
}

case $stage in
  both)
    code=0
    run correct 220 "$@" || code=$?
    run speed 240 "$@" || code=$?
    exit $code
    ;;
  all | correct | speed | profile | kernels | traffic | tune)
    run "$stage" 480 "$@"
    ;;
  chapter | cifar)
    if [ -n "${WHEELS:-}" ]; then
      site=$(mktemp -d)
      trap 'rm -rf "$site"' EXIT
      "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$WHEELS"/*.whl
      export PYTHONPATH="$PYTHONPATH:$site"
    fi
    : "${DENSELY_DATA:?set it to the folder that holds the data}"
    run "$stage" 480 "$@"
    ;;
  *)
    usage
    ;;
esac
