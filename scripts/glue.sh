#!/bin/sh
# The records of `lorafactory table glue`, task by task: five learning rates with seed 0, then the other seeds at the
# chosen one. Stop it at will: what is recorded is not run again.  Usage: scripts/glue.sh [sst2 cola mrpc]
set -u
PATH="$(dirname "$0")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
[ $# -gt 0 ] || set -- sst2 cola mrpc
sweep() { lorafactory run -m experiment=glue task="$1" seed=0 variant="$2" train.lr="$3"; }
for task; do
  sweep "$task" full 1e-5,3e-5,1e-4,3e-4,1e-3
  sweep "$task" lora,dora,pissa,rslora,eva,lora_ga,lora_plus,lora_pro,relora,galore,molora,hydra_lora,lotr 1e-4,3e-4,1e-3,3e-3,1e-2
  sweep "$task" bitfit,vera,ia3,adalora,gelora 1e-3,3e-3,1e-2,3e-2,1e-1
  sweep "$task" head_only 3e-3,1e-2,3e-2,1e-1,3e-1
done
lorafactory table glue --missing | sh
lorafactory table glue
