#!/bin/sh
# The records of `lorafactory table mos` (its four steps, left out one by one and all at once) and `table tenslora` (its
# seven modes in two forms): the vision experiment's digits, four learning rates with seed 0, then the other seeds at the
# chosen one. Stop it at will: what is recorded is not run again.  Usage: scripts/ablations.sh [mos tenslora]
set -u
PATH="$(dirname "$0")/../.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
[ $# -gt 0 ] || set -- mos tenslora
sweep() { lorafactory run -m experiment=vision seed=0 "results.experiment=$table" "variant=$table" "$@"; }
for table; do
  if [ "$table" = mos ]; then
    rates=train.lr=1e-3,3e-3,1e-2,3e-2
    sweep $rates
    sweep $rates variant.private=0
    sweep $rates variant.shards=1
    sweep $rates variant.dissociate=false
    sweep $rates variant.private=0 variant.shards=1 variant.dissociate=false
    sweep $rates variant.private=0 variant.shards=1 variant.dissociate=false variant.select=false
  else
    rates=train.lr=3e-3,1e-2,3e-2,1e-1
    sweep $rates variant.per_shape=true variant.form=tucker,cp variant.mode=qkv,depth,qkv_depth
    sweep $rates variant.per_shape=true variant.form=tucker,cp variant.mode=att,att_qkv,att_depth,att_qkv_depth variant.heads=4
  fi
  lorafactory table "$table" --missing | sh
  lorafactory table "$table"
done
