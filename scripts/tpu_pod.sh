#!/usr/bin/env bash
# Fine-tune on a TPU pod slice (several hosts): every host runs the same command, and JAX finds the others by itself.
#
#   SOURCE=git+https://… ZONE=us-west4-a TYPE=v5litepod-64 DATA=/mnt/data/bees scripts/tpu_pod.sh --model vit_large_patch16_224 --sharding fsdp
#
# The images have to lie at DATA on every host, and WORKDIR where the first host can read it again: a shared disk.
set -euo pipefail
: "${NAME:=jft}" "${ZONE:?the zone, e.g. us-west4-a}" "${TYPE:=v5litepod-64}" "${VERSION:=v2-alpha-tpuv5-lite}"
: "${DATA:?a folder that every host has}" "${WORKDIR:=/mnt/data/run}" "${SOURCE:?what pip installs as jft, e.g. git+https://…}"

tpu() { gcloud compute tpus tpu-vm "$@" --zone "$ZONE"; }
everywhere() { tpu ssh "$NAME" --worker all --command "$1"; }

tpu describe "$NAME" >/dev/null 2>&1 || tpu create "$NAME" --accelerator-type "$TYPE" --version "$VERSION"
everywhere "python3 -m pip install -q 'jax[tpu]' '$SOURCE'"
everywhere "jft finetune --distributed --data '$DATA' --workdir '$WORKDIR' $(printf '%q ' "$@")"
echo "The run is in $WORKDIR on the first host. Give the slice back with:"
echo "  gcloud compute tpus tpu-vm delete $NAME --zone $ZONE"
