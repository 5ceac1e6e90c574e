#!/bin/sh
# The records of the tables `sequence`, `sequence_joint` and `adaptation`: learning rates with seed 0, then the other seeds at
# the chosen one. Stop it at will: what is recorded is not run again.
set -u
PATH="$(dirname "$0")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
sweep() { variants=$1 rates=$2; shift 2; lorafactory run -m experiment=sequence seed=0 "variant=$variants" "train.lr=$rates" "$@"; }
sweep full 3e-5,1e-4,3e-4,1e-3,3e-3
sweep lora,owlora 1e-4,3e-4,1e-3,3e-3,1e-2
sweep o_lora 3e-4,1e-3,3e-3,1e-2,3e-2
sweep inflora 3e-4,1e-3,3e-3,1e-2,3e-2
sweep share 1e-3,3e-3,1e-2,3e-2,1e-1
sweep lora 1e-3,3e-3,1e-2 task.joint=true task.name=turned_digits_joint train.steps=500
adapt() { lorafactory run -m experiment=adaptation seed=0 "variant=$1" "train.lr=$2"; }
adapt vida 1e-3,3e-3,1e-2,3e-2
adapt lora 1e-4,3e-4,1e-3,3e-3
adapt ln_tuning 1e-3,3e-3,1e-2
adapt full 3e-5,1e-4,3e-4
lorafactory table sequence --missing | sh
lorafactory table sequence_joint --missing | sh
lorafactory table adaptation --missing | sh
lorafactory table sequence
lorafactory table sequence_joint
lorafactory table adaptation
