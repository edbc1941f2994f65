#!/usr/bin/env bash
# A training job on GKE from a plain JobSet manifest (launch/gke/jobset.yaml): one child Job for each TPU slice.
# The cluster needs the JobSet controller and node pools of the wanted TPU topology.
set -euo pipefail

# shellcheck source=launch/options.sh
source "$(dirname "${BASH_SOURCE[0]}")/../options.sh"

usage() {
  cat <<'USAGE'
usage: launch/gke/jobset.sh COMMAND --name=NAME [OPTION ...] [-- TRAINING ARGUMENT ...]
commands
  render   prints the manifest
  apply    checks, then renders it and gives it to kubectl
  status   lists the JobSet and its pods
  logs     follows the log of process 0
  delete   SIGTERM to training (it saves, within --grace), then the JobSet is gone
options
  --name=NAME             of the JobSet (required)
  --namespace=NAMESPACE   (default)
  --context=CONTEXT       of kubectl (its current one)
options of render and apply
  --tpu=GENERATION        v4, v5e, v5p, v6e or tpu7x (required)
  --topology=AxB[xC]      chips of one slice, as in the node pool: 4x4 for v5e and v6e, 4x4x4 for the others (required)
  --image=IMAGE           built from launch/Dockerfile.tpu (required)
  --slices=N              (1)
  --chips-per-node=N      1, 4 or 8: of the node pool's machine type (1 for a slice of one chip, else 4)
  --claim=NAME            ReadWriteMany PersistentVolumeClaim, mounted at /workdir, for data and checkpoints
  --queue=NAME            Kueue's LocalQueue
  --spot                  on Spot nodes
  --max-restarts=N        of the whole JobSet (100)
  --grace=SECONDS         between SIGTERM and SIGKILL, for the last checkpoint (120)
  --extras=LIST           apply: further extras of the package that the image has, e.g. s3,wandb
  --no-check              apply: do not look first for what would make training fail (train --check)
  --dry-run               prints the commands (and the manifest), runs none
Example: launch/gke/jobset.sh apply --name=atma --tpu=v6e --topology=4x4 --image=REPOSITORY/atma_jax:1 --claim=runs \
           -- --config=configs/atma_378m.py --workdir=/workdir/378m
USAGE
}

DRY_RUN=0
commands="render, apply, status, logs, delete"
command=
name=
namespace=default
context=
tpu=
topology=
image=
slices=1
chips_per_node=
claim=
queue=
spot=
max_restarts=100
grace=120
extras=tpu
CHECK=1
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    render | apply | status | logs | delete)
      [[ -z $command ]] || usage_error "two commands, '$command' and '$1': give one of $commands"
      command=$1
      ;;
    --dry-run) DRY_RUN=1 ;;
    --name=?*) name=${1#*=} ;;
    --namespace=?*) namespace=${1#*=} ;;
    --context=?*) context=${1#*=} ;;
    --tpu=?*) tpu=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --chips-per-node=?*) chips_per_node=${1#*=} ;;
    --claim=?*) claim=${1#*=} ;;
    --queue=?*) queue=${1#*=} ;;
    --spot) spot=1 ;;
    --max-restarts=?*) max_restarts=${1#*=} ;;
    --extras=?*) extras=tpu,${1#*=} ;;
    --no-check) CHECK=0 ;;
    --grace=?*) grace=${1#*=} ;;
    --help | -h) usage && exit 0 ;;
    *)
      usage_error "unknown argument '$1': legal are a command ($commands), --name=, --namespace=, --context=, --tpu=," \
        "--topology=, --image=, --slices=, --chips-per-node=, --claim=, --queue=, --spot, --max-restarts=, --grace=," \
        "--extras=, --no-check, --dry-run, --help, then -- TRAINING ARGUMENT"
      ;;
  esac
  shift
done
[[ $# == 0 ]] || shift
need COMMAND "$command" "one of $commands"
need --name "$name" "--name=NAME of the JobSet"
resource_name --name "$name"
resource_name --namespace "$namespace"
kubectl=(kubectl ${context:+"--context=$context"} "--namespace=$namespace")

json() {  # text: prints it as a JSON (and so YAML) string
  local text=$1
  [[ $text != *[[:cntrl:]]* ]] || usage_error "an argument has a line break or control character: ${text@Q}"
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  echo "\"$text\""
}

check() {  # training argument...: what render and apply need
  local generations="v4, v5e, v5p, v6e or tpu7x" dimensions
  need --tpu "$tpu" "$generations"
  case $tpu in
    v4) accelerator=tpu-v4-podslice dimensions=3 ;;
    v5e) accelerator=tpu-v5-lite-podslice dimensions=2 ;;
    v5p) accelerator=tpu-v5p-slice dimensions=3 ;;
    v6e) accelerator=tpu-v6e-slice dimensions=2 ;;
    tpu7x) accelerator=tpu7x dimensions=3 ;;
    *) usage_error "--tpu=$tpu: legal are $generations" ;;
  esac
  need --topology "$topology" "e.g. 4x4 for v5e and v6e, 4x4x4 for v4, v5p and tpu7x"
  if [[ $dimensions == 2 ]]; then
    [[ $topology =~ ^[1-9][0-9]{0,2}x[1-9][0-9]{0,2}$ ]] || usage_error "--topology=$topology: $tpu has AxB, e.g. 4x4"
  else
    [[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){2}$ ]] ||
      usage_error "--topology=$topology: $tpu has AxBxC, e.g. 4x4x4"
  fi
  local chips=$((${topology//x/*}))
  [[ -n $chips_per_node ]] || chips_per_node=$((chips == 1 ? 1 : 4))
  one_of --chips-per-node "$chips_per_node" 1 4 8
  ((chips % chips_per_node == 0)) ||
    usage_error "--topology=$topology: $chips chips are no multiple of --chips-per-node=$chips_per_node"
  nodes=$((chips / chips_per_node))
  whole --slices "$slices" 1
  whole --max-restarts "$max_restarts" 0
  whole --grace "$grace" 1
  need --image "$image" "--image=IMAGE built from launch/Dockerfile.tpu"
  [[ -z $claim ]] || resource_name --claim "$claim"
  [[ -z $queue ]] || resource_name --queue "$queue"
  [[ $# -gt 0 ]] || usage_error "TRAINING ARGUMENT is required: -- --config=FILE --workdir=DIR"
}

render() {  # training argument...
  local word list='"python", "-m", "atma_jax.train"' manifest line flags option name_of value
  for word in "$@"; do
    list+=", $(json "$word")"
  done
  flags=$(bash "$root/launch/xla_flags.sh" "$tpu")
  manifest=
  while IFS= read -r line; do
    if [[ $line =~ ^(.*)" #if "([A-Z]+)$ ]]; then
      line=${BASH_REMATCH[1]}
      option=${BASH_REMATCH[2]}
      case $option in
        CLAIM) [[ -n $claim ]] || continue ;;
        QUEUE) [[ -n $queue ]] || continue ;;
        SPOT) [[ -n $spot ]] || continue ;;
      esac
    fi
    manifest+=$line$'\n'
  done <"$root/launch/gke/jobset.yaml"
  [[ -n $queue ]] || manifest=${manifest/$'  labels:\n'/}  # it held the queue only
  set -- NAME "$name" NAMESPACE "$namespace" QUEUE "$queue" MAX_RESTARTS "$max_restarts" SLICES "$slices" \
    NODES "$nodes" GRACE "$grace" ACCELERATOR "$accelerator" TOPOLOGY "$topology" IMAGE "$(json "$image")" \
    LIBTPU_INIT_ARGS "$(json "${flags#*=}")" CHIPS "$chips_per_node" CLAIM "$claim" COMMAND "[$list]"
  while [[ $# -gt 0 ]]; do
    name_of=$1
    value=$2
    manifest=${manifest//"@$name_of@"/"$value"}
    shift 2
  done
  printf '%s' "$manifest"
}

case $command in
  render)
    check "$@"
    render "$@"
    ;;
  apply)
    check "$@"
    manifest=$(render "$@")
    check_training "" "--check_for=$(devices_of "$tpu-$topology" "$slices")" "--check_elsewhere=$extras" -- "$@"
    if [[ $DRY_RUN == 1 ]]; then
      echo "$(quoted "${kubectl[@]}" apply -f -) <<'MANIFEST'"
      echo "$manifest"
      echo MANIFEST
    else
      "${kubectl[@]}" apply -f - <<<"$manifest"
    fi
    ;;
  *)
    [[ $# == 0 ]] || usage_error "unexpected '-- $1': only render and apply take training arguments"
    selector=--selector=jobset.sigs.k8s.io/jobset-name=$name
    case $command in
      status)
        run "${kubectl[@]}" get jobset "$name"
        run "${kubectl[@]}" get pods "$selector" --output=wide
        ;;
      logs)
        run "${kubectl[@]}" logs --follow --tail=100 --container=train \
          "$selector,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        ;;
      delete) run "${kubectl[@]}" delete jobset "$name" ;;
    esac
    ;;
esac
