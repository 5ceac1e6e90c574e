#!/bin/sh
# The records of `lorafactory table generation`: three learning rates with seed 0, then the other seeds at the chosen one.
# Stop it at will: what is recorded is not run again.  Usage: scripts/generation.sh [VARIANT …]
set -u
PATH="$(dirname "$0")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
[ $# -gt 0 ] || set -- lora dora pissa rslora lora_plus vera
for variant; do
  case $variant in
    rslora | lora_plus | pissa) rates=1e-4,3e-4,1e-3 ;;
    vera) rates=3e-3,1e-2,3e-2 ;;
    *) rates=3e-4,1e-3,3e-3 ;;
  esac
  lorafactory run -m experiment=generation seed=0 variant="$variant" train.lr=$rates
done
lorafactory table generation --missing | sh
lorafactory table generation
