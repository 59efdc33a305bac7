#!/usr/bin/env bash
# Fine-tune on a TPU VM with one host (v5e-8, v6e-8 …): make it, install, train, fetch the result, give it back.
#
#   SOURCE=git+https://… ZONE=us-west4-a TYPE=v5litepod-8 DATA=gs://bucket/bees scripts/tpu_vm.sh --model vit_base_patch16_224 --plan lp-ft
set -euo pipefail
: "${NAME:=jft}" "${ZONE:?the zone, e.g. us-west4-a}" "${TYPE:=v5litepod-8}" "${VERSION:=v2-alpha-tpuv5-lite}"
: "${DATA:?gs://… of a folder of class folders}" "${SOURCE:?what pip installs as jft, e.g. git+https://…}"

tpu() { gcloud compute tpus tpu-vm "$@" --zone "$ZONE"; }
run() { tpu ssh "$NAME" --command "$1"; }

tpu create "$NAME" --accelerator-type "$TYPE" --version "$VERSION"
trap 'tpu delete "$NAME" --quiet' EXIT
run "python3 -m pip install -q 'jax[tpu]' '$SOURCE'"
run "mkdir -p data && gcloud storage cp -r '$DATA/*' data/"
# A preempted VM stops with SIGTERM: the run saves, and the same command goes on from there.
run "jft finetune --data data --workdir run $(printf '%q ' "$@")"
tpu scp --recurse "$NAME:run" .
