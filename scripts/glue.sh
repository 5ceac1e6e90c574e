#!/bin/sh
# The records of `lorafactory table glue`, task by task: the learning rates with seed 0, then the other seeds at the
# chosen one. Stop it at will: what is recorded is not run again.  Usage: scripts/glue.sh [sst2 cola mrpc]
# CoLA and MRPC train longer and were tried at three rates, around a third of the best of five on SST-2.
set -u
PATH="$(dirname "$0")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
[ $# -gt 0 ] || set -- sst2 cola mrpc
sweep() { lorafactory run -m experiment=glue task="$1" seed=0 variant="$2" train.lr="$3"; }
for task; do
  if [ "$task" = sst2 ]; then
    sweep sst2 full 1e-5,3e-5,1e-4,3e-4,1e-3
    sweep sst2 lora,dora,pissa,rslora,eva,lora_ga,lora_plus,lora_pro,relora,galore,molora,hydra_lora,lotr 1e-4,3e-4,1e-3,3e-3,1e-2
    sweep sst2 bitfit,vera,ia3,adalora,gelora 1e-3,3e-3,1e-2,3e-2,1e-1
    sweep sst2 head_only 3e-3,1e-2,3e-2,1e-1,3e-1
  else
    sweep "$task" full,galore 3e-5,1e-4,3e-4
    sweep "$task" lora,dora,relora,molora,hydra_lora 3e-4,1e-3,3e-3
    sweep "$task" rslora,lora_plus,lora_pro,pissa,lora_ga,eva 1e-4,3e-4,1e-3
    sweep "$task" vera,ia3,adalora 3e-3,1e-2,3e-2
    sweep "$task" bitfit,gelora,lotr 1e-3,3e-3,1e-2
    sweep "$task" head_only 1e-2,3e-2,1e-1
  fi
done
lorafactory table glue --missing | sh
lorafactory table glue
