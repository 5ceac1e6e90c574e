#!/bin/sh
# The records of `lorafactory table vision`: four learning rates with seed 0, then the other seeds at the chosen one.
# Stop it at will: what is recorded is not run again.
set -u
PATH="$(dirname "$0")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
sweep() { lorafactory run -m experiment=vision seed=0 variant="$1" train.lr="$2"; }
sweep full,lora,dora,pissa,rslora,eva,lora_ga,lora_plus,lora_pro,relora,galore,molora,hydra_lora 3e-4,1e-3,3e-3,1e-2
sweep loha,lokr,hira,hydra,miss,oft,boft,hra,delora 1e-3,3e-3,1e-2,3e-2
sweep melora,moslora,rasa,mos,denselora,randlora,shira,svft,gated_lora,queryable_lora 1e-3,3e-3,1e-2,3e-2
sweep map,bora,block_lora,tied_lora,loretta,fact,lora_xs,c3a,waveft,salt,sara 3e-3,1e-2,3e-2,1e-1
sweep vb_lora,nola,tera,fourierft,svf,e8_lora,leech_lora 1e-2,3e-2,1e-1,3e-1
sweep gelora 1e-3,3e-3,1e-2,3e-2
sweep lotr,adalora,krona 3e-3,1e-2,3e-2,1e-1
sweep head_only,bitfit,ln_tuning,ia3,vera 1e-2,3e-2,1e-1,3e-1
lorafactory table vision --missing | sh
lorafactory table vision
