#!/bin/sh
# The records of `lorafactory table vision`: learning rates with seed 0, wider where the best one stood at the edge, then
# the other seeds at the chosen one. Stop it at will: what is recorded is not run again.
set -u
PATH="$(dirname "$0")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
sweep() { variants=$1 rates=$2; shift 2; lorafactory run -m experiment=vision seed=0 "variant=$variants" "train.lr=$rates" "$@"; }
sweep full,pissa,rslora,eva,lora_ga,lora_plus,lora_pro,galore 3e-4,1e-3,3e-3,1e-2
sweep lora,dora,relora,molora,hydra_lora 3e-4,1e-3,3e-3,1e-2,3e-2
sweep gated_lora 3e-4,1e-3,3e-3,1e-2,3e-2
sweep melora,moslora,rasa,mos,denselora,randlora,shira,queryable_lora,hydra,miss,oft,delora,gelora 1e-3,3e-3,1e-2,3e-2
sweep nola 1e-3,3e-3,1e-2,3e-2 variant.bases=held  # drawn anew they are the same, and take twenty times as long here
sweep block_lora,loha,lokr,hira,boft,hra,svft 1e-3,3e-3,1e-2,3e-2,1e-1
sweep lotr,adalora,krona,map,bora,tied_lora,lora_xs,salt,sara,fact,loretta 3e-3,1e-2,3e-2,1e-1
sweep c3a 3e-3,1e-2,3e-2,1e-1,3e-1
sweep head_only,bitfit,ln_tuning,ia3,vera,e8_lora,leech_lora,tera,svf,vb_lora 1e-2,3e-2,1e-1,3e-1
sweep fourierft 1e-3,3e-3,1e-2,3e-2 variant.start=zero  # its random start is larger than this base's weights
sweep lora_fa,allora,lora_rite,riemannian,delta_lora,periodic_lora,monteclora 3e-4,1e-3,3e-3,1e-2,3e-2
sweep flora_opt 3e-4,1e-3,3e-3,1e-2
sweep sora,increlora,alora,autolora,diffora,codyra,dylora,matryoshka_lora,lora_squeeze,colora,airllm 1e-3,3e-3,1e-2,3e-2
sweep waveft 1e-4,3e-4,1e-3,3e-3
lorafactory table vision --missing | sh
lorafactory table vision
