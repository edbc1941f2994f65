#!/usr/bin/env bash
# A training job on GKE through xpk (the Accelerated Processing Kit): cluster, workload, logs, deletion.
set -euo pipefail

# shellcheck source=launch/options.sh
source "$(dirname "${BASH_SOURCE[0]}")/../options.sh"

usage() {
  cat <<'USAGE'
usage: launch/gke/xpk.sh COMMAND --cluster=CLUSTER --zone=ZONE [OPTION ...] [-- TRAINING ARGUMENT ...]
commands
  create-cluster   a GKE cluster with --slices node pools of --tpu-type, JobSet and Kueue installed
  run              checks, then starts the job
  list             lists the cluster's jobs
  logs             follows the log of process 0
  delete           deletes the job
  delete-cluster   deletes the cluster
options
  --cluster=CLUSTER, --zone=ZONE   (both required)
  --project=PROJECT      (gcloud's own default)
  --name=NAME            of the job: run, logs, delete
  --tpu-type=TYPE        create-cluster, run: e.g. v6e-16, v5litepod-16, v5p-32, tpu7x-32, or with a topology, v6e-4x4
  --slices=N             create-cluster, run (1)
  --image=IMAGE          run: built from launch/Dockerfile.tpu
  --module=MODULE        run: of atma_jax, takes the arguments (atma_jax.train)
  --storage=NAME         run: storage attached to the cluster before (xpk storage attach), for data and checkpoints
  --priority=PRIORITY    run: very-low, low, medium, high, very-high (medium)
  --max-restarts=N       run: of the whole job, on exit code 75 and on crashes (100)
  --grace=SECONDS        run: between SIGTERM and SIGKILL, for the last checkpoint (120)
  --extras=LIST          run: further extras of the package that the image has, e.g. s3,wandb
  --no-check             run: do not look first for what would make training fail (train --check)
  --spot | --on-demand | --reservation=NAME   create-cluster: one of them is required
  --dry-run              prints the commands, runs none
Example: launch/gke/xpk.sh run --cluster=atma --zone=us-east5-b --name=atma-378m --tpu-type=v6e-16 \
           --image=REPOSITORY/atma_jax:1 --storage=runs -- --config=configs/atma_378m.py --workdir=/runs/378m
USAGE
}

DRY_RUN=0
commands="create-cluster, run, list, logs, delete, delete-cluster"
command=
cluster=
zone=
project=
name=
tpu_type=
slices=1
image=
storage=
module=atma_jax.train
priority=medium
max_restarts=100
grace=120
extras=tpu
CHECK=1
capacity=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    create-cluster | run | list | logs | delete | delete-cluster)
      [[ -z $command ]] || usage_error "two commands, '$command' and '$1': give one of $commands"
      command=$1
      ;;
    --dry-run) DRY_RUN=1 ;;
    --cluster=?*) cluster=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --name=?*) name=${1#*=} ;;
    --tpu-type=?*) tpu_type=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --storage=?*) storage=${1#*=} ;;
    --module=?*) module=${1#*=} ;;
    --priority=?*) priority=${1#*=} ;;
    --max-restarts=?*) max_restarts=${1#*=} ;;
    --extras=?*) extras=tpu,${1#*=} ;;
    --no-check) CHECK=0 ;;
    --grace=?*) grace=${1#*=} ;;
    --spot | --on-demand | --reservation=?*) capacity+=("$1") ;;
    --help | -h) usage && exit 0 ;;
    *)
      usage_error "unknown argument '$1': legal are a command ($commands), --cluster=, --zone=, --project=, --name=," \
        "--tpu-type=, --slices=, --image=, --storage=, --module=, --priority=, --max-restarts=, --grace=, --extras=, --no-check, --spot, --on-demand," \
        "--reservation=, --dry-run, --help, then -- TRAINING ARGUMENT"
      ;;
  esac
  shift
done
[[ $# == 0 ]] || shift
need COMMAND "$command" "one of $commands"
need --cluster "$cluster" "--cluster=CLUSTER"
need --zone "$zone" "--zone=ZONE, e.g. us-east5-b"
resource_name --cluster "$cluster"
whole --slices "$slices" 1
where=("--cluster=$cluster" "--zone=$zone" ${project:+"--project=$project"})
case $command in
  run | logs | delete)
    need --name "$name" "--name=NAME of the job"
    resource_name --name "$name"
    ((${#name} <= 28)) || usage_error "--name=$name: xpk takes up to 28 characters"
    ;;
esac
[[ $command == run || $# == 0 ]] || usage_error "unexpected '-- $1': only run takes training arguments"

case $command in
  create-cluster | run)
    need --tpu-type "$tpu_type" "--tpu-type=TYPE, e.g. v6e-16, v5litepod-16, v5p-32, tpu7x-32"
    generation=$(accelerator_generation "$tpu_type")
    [[ -n $generation ]] || usage_error "--tpu-type=$tpu_type: legal are v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N"
    ;;
esac

case $command in
  create-cluster)
    [[ ${#capacity[@]} == 1 ]] || usage_error "--spot, --on-demand or --reservation=NAME: one of them is required"
    run xpk cluster create "${where[@]}" "--tpu-type=$tpu_type" "--num-slices=$slices" "${capacity[@]}"
    ;;
  run)
    need --image "$image" "--image=IMAGE built from launch/Dockerfile.tpu"
    one_of --priority "$priority" very-low low medium high very-high
    whole --max-restarts "$max_restarts" 0
    whole --grace "$grace" 1
    one_of --module "$module" atma_jax.train atma_jax.ablate atma_jax.evaluate
    [[ $# -gt 0 ]] || usage_error "TRAINING ARGUMENT is required: -- --config=FILE --workdir=DIR"
    if [[ $module == atma_jax.train ]]; then
      check_training "" "--check_for=$(devices_of "$tpu_type" "$slices")" "--check_elsewhere=$extras" -- "$@"
    fi
    # Without --restart-on-exit-codes xpk restarts on 42 and 127 to 255 only; 2, bad input, ends the job.
    run xpk workload create "${where[@]}" "--workload=$name" "--tpu-type=$tpu_type" "--num-slices=$slices" \
      "--docker-image=$image" ${storage:+"--storage=$storage"} "--priority=$priority" \
      "--max-restarts=$max_restarts" --restart-on-exit-codes=1,75 "--termination-grace-period-seconds=$grace" \
      "--env=$(bash "$root/launch/xla_flags.sh" "$generation")" \
      "--command=exec python -m $module $(quoted "$@")"
    ;;
  list) run xpk workload list "${where[@]}" ;;
  logs)
    run gcloud container clusters get-credentials "$cluster" "--location=${zone%-*}" ${project:+"--project=$project"}
    run kubectl logs --follow --tail=100 --all-containers \
      "--selector=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) run xpk workload delete "${where[@]}" "--workload=$name" --force ;;
  delete-cluster) run xpk cluster delete "${where[@]}" --force ;;
esac
