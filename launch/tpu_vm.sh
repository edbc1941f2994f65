#!/usr/bin/env bash
# A training job on Cloud TPU VMs: create them, install this checkout, run on all workers, follow the log, delete.
# For v4, v5e, v5p and v6e; the Cloud TPU API that this calls serves no TPU7x and later: launch/gke.
set -euo pipefail

# shellcheck source=launch/options.sh
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

usage() {
  cat <<'USAGE'
usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTION ...] [-- TRAINING ARGUMENT ...]
commands
  create   asks for the TPU: at once, or with --queued through the queue (and --slices=N for several slices)
  wait     returns when the queued resource is ACTIVE; exit code 1 when it FAILED or was SUSPENDED
  setup    copies HEAD of this checkout to every worker and installs it there (and mounts --nfs)
  run      checks, then starts `python -m atma_jax.train TRAINING ARGUMENT ...` on every worker, babysat by launch/run.sh
  logs     follows the log of one worker
  stop     SIGTERM to training on every worker: it saves and ends
  delete   deletes the TPU and everything on its disks
  launch   checks, create, wait (if queued), setup, run, logs; the same command brings a pre-empted job back
options
  --name=NAME, --zone=ZONE     of the TPU (both required)
  --project=PROJECT            (gcloud's own default)
  --accelerator=TYPE           create, run, launch: e.g. v6e-16, v5litepod-16, v5p-32, v4-32
  --runtime=VERSION            create: image of the VMs (the one for JAX on that generation)
  --spot | --reserved          create: pre-emptible capacity, or a reservation
  --queued                     the TPU is a queued resource (every command)
  --slices=N                   the queued resource has N slices (every command; 1)
  --network=NAME, --subnetwork=NAME, --service-account=EMAIL     create
  --nfs=SERVER:/EXPORT         setup: mounts it at /mnt/atma on every worker, for data (and checkpoints) that all see
  --extras=LIST                setup, run, launch: further extras of the package, e.g. s3,wandb
  --no-check                   run, launch: do not look first for what would make training fail (train --check)
  --worker=N                   logs: which worker (0)
  --dry-run                    prints the commands, runs none
Example: launch/tpu_vm.sh launch --name=atma --zone=us-east5-b --accelerator=v6e-16 --spot --queued \
           --nfs=10.0.0.2:/share -- --config=configs/atma_378m.py --workdir=/mnt/atma/runs/378m
USAGE
}

DRY_RUN=0
commands="create, wait, setup, run, logs, stop, delete, launch"
command=
name=
zone=
project=
accelerator=
runtime=
capacity=()
queued=0
slices=1
placement=()
nfs=
worker=0
extras=tpu
CHECK=1
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    create | wait | setup | run | logs | stop | delete | launch)
      [[ -z $command ]] || usage_error "two commands, '$command' and '$1': give one of $commands"
      command=$1
      ;;
    --dry-run) DRY_RUN=1 ;;
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --accelerator=?*) accelerator=${1#*=} ;;
    --runtime=?*) runtime=${1#*=} ;;
    --spot | --reserved) capacity+=("$1") ;;
    --queued) queued=1 ;;
    --slices=?*) slices=${1#*=} ;;
    --network=?* | --subnetwork=?* | --service-account=?*) placement+=("$1") ;;
    --nfs=?*) nfs=${1#*=} ;;
    --extras=?*) extras=tpu,${1#*=} ;;
    --no-check) CHECK=0 ;;
    --worker=?*) worker=${1#*=} ;;
    --help | -h) usage && exit 0 ;;
    *)
      usage_error "unknown argument '$1': legal are a command ($commands), --name=, --zone=, --project=," \
        "--accelerator=, --runtime=, --spot, --reserved, --queued, --slices=, --network=, --subnetwork=," \
        "--service-account=, --nfs=, --extras=, --no-check, --worker=, --dry-run, --help, then -- TRAINING ARGUMENT"
      ;;
  esac
  shift
done
[[ $# == 0 ]] || shift
need COMMAND "$command" "one of $commands"
need --name "$name" "--name=NAME of the TPU"
resource_name --name "$name"
need --zone "$zone" "--zone=ZONE, e.g. us-east5-b"
whole --slices "$slices" 1
whole --worker "$worker" 0
[[ ${#capacity[@]} -le 1 ]] || usage_error "${capacity[*]}: give one of --spot, --reserved"
[[ $slices == 1 || $queued == 1 ]] || usage_error "--slices=$slices: several slices need --queued"
[[ -z $nfs || $nfs =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9_./-]+$ ]] || usage_error "--nfs=$nfs: must be SERVER:/EXPORT"
[[ $extras =~ ^[a-z0-9,]+$ ]] || usage_error "--extras=${extras#tpu,}: must be extras of the package, e.g. s3,wandb"
case $command in
  run | launch) [[ $# -gt 0 ]] || usage_error "TRAINING ARGUMENT is required: -- --config=FILE --workdir=DIR" ;;
  *) [[ $# == 0 ]] || usage_error "unexpected '-- $1': only run and launch take training arguments" ;;
esac

generation=
case $command in
  create | run | launch)
    need --accelerator "$accelerator" "--accelerator=TYPE, e.g. v6e-16, v5litepod-16, v5p-32, v4-32"
    generation=$(accelerator_generation "$accelerator")
    case $generation in
      v4) image=tpu-ubuntu2204-base ;;
      v5e) image=v2-alpha-tpuv5-lite ;;
      v5p) image=v2-alpha-tpuv5 ;;
      v6e) image=v2-alpha-tpuv6e ;;
      tpu7x) usage_error "--accelerator=$accelerator: TPU7x has no TPU VMs of this kind; use launch/gke" ;;
      *) usage_error "--accelerator=$accelerator: legal are v4-N, v5litepod-N, v5p-N, v6e-N" ;;
    esac
    ;;
esac

where=("--zone=$zone" ${project:+"--project=$project"})
tpus=(gcloud compute tpus)
if [[ $slices == 1 ]]; then  # a queued resource of one slice makes a node of the same name
  reach=("${tpus[@]}" tpu-vm)
  all=(--worker=all)
else
  reach=("${tpus[@]}" queued-resources)
  all=(--worker=all --node=all)
fi

everywhere() {  # shell command: on every worker
  run "${reach[@]}" ssh "$name" "${where[@]}" "${all[@]}" "--command=$1"
}

create() {
  local request=("${where[@]}" "--accelerator-type=$accelerator")
  request+=(${capacity[@]+"${capacity[@]}"} ${placement[@]+"${placement[@]}"})
  if [[ $queued == 0 ]]; then
    run "${tpus[@]}" tpu-vm create "$name" "${request[@]}" "--version=${runtime:-$image}"
  elif [[ $slices == 1 ]]; then
    run "${tpus[@]}" queued-resources create "$name" "${request[@]}" "--runtime-version=${runtime:-$image}" \
      "--node-id=$name"
  else
    run "${tpus[@]}" queued-resources create "$name" "${request[@]}" "--runtime-version=${runtime:-$image}" \
      "--node-count=$slices" "--node-prefix=$name"
  fi
}

await_active() {
  local describe=("${tpus[@]}" queued-resources describe "$name" "${where[@]}" '--format=value(state.state)') state last=
  [[ $queued == 1 ]] || usage_error "wait: only for queued resources (--queued)"
  echo "# until it prints ACTIVE, every 30 s:"
  if [[ $DRY_RUN == 1 ]]; then
    run "${describe[@]}"
    return
  fi
  quoted "${describe[@]}"
  while :; do
    state=$("${describe[@]}")
    [[ $state == "$last" ]] || echo "# $name: $state"
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING)
        echo "error: $name is $state: delete it and ask again (for launch: delete, then the same command)" >&2
        exit 1
        ;;
    esac
    sleep "${ATMA_POLL_SECONDS:-30}"
  done
}

setup() {
  local bundle
  if [[ $DRY_RUN == 1 ]]; then
    bundle=/tmp/atma_jax.tar.gz
  else
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    bundle=$scratch/atma_jax.tar.gz
  fi
  run git -C "$root" archive --format=tar.gz "--output=$bundle" HEAD
  run "${reach[@]}" scp "$bundle" "$name:atma_jax.tar.gz" "${where[@]}" "${all[@]}"
  # The images carry Python 3.10; uv brings a newer one.
  everywhere 'set -e; rm -rf atma_jax; mkdir atma_jax; tar -xzf atma_jax.tar.gz -C atma_jax; python3 -m pip install --quiet --user uv; cd atma_jax; ~/.local/bin/uv venv --quiet --clear --python 3.12 ~/atma_venv; ~/.local/bin/uv pip install --quiet --python ~/atma_venv/bin/python --constraint launch/constraints.txt ".['"$extras"']"'
  if [[ -n $nfs ]]; then
    everywhere "set -e; sudo apt-get -qq update; sudo apt-get -qq install -y nfs-common; sudo mkdir -p /mnt/atma; mountpoint -q /mnt/atma || sudo mount -o rw,intr $nfs /mnt/atma; sudo chmod go+rw /mnt/atma"
  fi
}

start() {  # training argument...
  local training
  # shellcheck disable=SC2088  # expanded over there
  training="~/atma_venv/bin/python -m atma_jax.train --distributed=cloud_tpu $(quoted "$@")"
  everywhere "cd atma_jax; nohup launch/run.sh --no-check --generation=$generation -- $training >>~/atma_jax.log 2>&1 </dev/null & echo \$! >~/atma_jax.pid"
}

follow() {
  local node=()
  [[ $slices == 1 ]] || node=(--node=0)
  run "${reach[@]}" ssh "$name" "${where[@]}" "--worker=$worker" ${node[@]+"${node[@]}"} \
    '--command=tail -n 100 -F ~/atma_jax.log'
}

case $command in
  run | launch)
    check_training "" "--check_for=$(devices_of "$accelerator" "$slices")" "--check_elsewhere=$extras" -- "$@"
    ;;
esac
case $command in
  create) create ;;
  wait) await_active ;;
  setup) setup ;;
  run) start "$@" ;;
  logs) follow ;;
  stop) everywhere "kill -TERM \$(cat ~/atma_jax.pid)" ;;
  delete)
    if [[ $queued == 1 ]]; then
      run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
    else
      run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
    fi
    ;;
  launch)
    create
    [[ $queued == 0 ]] || await_active
    setup
    start "$@"
    follow
    ;;
esac
