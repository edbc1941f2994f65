#!/usr/bin/env bash
# Submits a training job on GPU nodes to Slurm: launch/slurm.sbatch with one task for each GPU.
set -euo pipefail

# shellcheck source=launch/options.sh
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

usage() {
  cat <<'USAGE'
usage: launch/slurm.sh [COMMAND] --name=NAME [OPTION ...] [-- TRAINING ARGUMENT ...]
commands
  submit (default)   checks, then gives the job to sbatch
  status             its place in the queue
  logs               follows its log (runs/logs/NAME.log)
  cancel             SIGTERM to training (it saves), and the job is not requeued
options
  --name=NAME              of the job (required)
options of submit
  --nodes=N                (required)
  --gpus-per-node=N        (required); as many tasks run on each node
  --time=TIME              limit, as sbatch takes it: minutes, HH:MM:SS or D-HH:MM:SS (required)
  --cpus-per-task=N        (8)
  --partition=NAME, --account=NAME, --qos=NAME, --constraint=LIST    passed to sbatch
  --python=PATH            interpreter of the environment, seen by all nodes (python)
  --module=MODULE          of atma_jax that takes the arguments (atma_jax.train)
  --max-restarts=N         requeues after crashes (10); pre-emption and the time limit requeue without a limit
  --grace=SECONDS          SIGTERM this long before the time limit, for the last checkpoint (300)
  --no-check               do not look first for what would make training fail (train --check)
  --dry-run                prints the commands, runs none
The checkout and --workdir must be on a file system that all nodes see.
Example: launch/slurm.sh --name=atma --nodes=2 --gpus-per-node=8 --time=24:00:00 --partition=gpu \
           --python=$PWD/.venv/bin/python -- --config=configs/atma_378m.py --workdir=$PWD/runs/378m
USAGE
}

DRY_RUN=0
commands="submit, status, logs, cancel"
command=
name=
nodes=
gpus=
time_limit=
cpus=8
passed=()
python=python
module=atma_jax.train
max_restarts=10
grace=300
CHECK=1
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    submit | status | logs | cancel)
      [[ -z $command ]] || usage_error "two commands, '$command' and '$1': give one of $commands"
      command=$1
      ;;
    --dry-run) DRY_RUN=1 ;;
    --name=?*) name=${1#*=} ;;
    --nodes=?*) nodes=${1#*=} ;;
    --gpus-per-node=?*) gpus=${1#*=} ;;
    --time=?*) time_limit=${1#*=} ;;
    --cpus-per-task=?*) cpus=${1#*=} ;;
    --partition=?* | --account=?* | --qos=?* | --constraint=?*) passed+=("$1") ;;
    --python=?*) python=${1#*=} ;;
    --module=?*) module=${1#*=} ;;
    --max-restarts=?*) max_restarts=${1#*=} ;;
    --no-check) CHECK=0 ;;
    --grace=?*) grace=${1#*=} ;;
    --help | -h) usage && exit 0 ;;
    *)
      usage_error "unknown argument '$1': legal are a command ($commands), --name=, --nodes=, --gpus-per-node=, --time=," \
        "--cpus-per-task=, --partition=, --account=, --qos=, --constraint=, --python=, --module=, --max-restarts=," \
        "--grace=, --no-check, --dry-run, --help, then -- TRAINING ARGUMENT"
      ;;
  esac
  shift
done
[[ $# == 0 ]] || shift
command=${command:-submit}
need --name "$name" "--name=NAME of the job"
resource_name --name "$name"
if [[ $command != submit && $# -gt 0 ]]; then
  usage_error "unexpected '-- $1': only submit takes training arguments"
fi

case $command in
  submit)
    need --nodes "$nodes" "--nodes=N"
    need --gpus-per-node "$gpus" "--gpus-per-node=N"
    need --time "$time_limit" "--time=TIME, e.g. 24:00:00"
    whole --nodes "$nodes" 1
    whole --gpus-per-node "$gpus" 1
    whole --cpus-per-task "$cpus" 1
    whole --max-restarts "$max_restarts" 0
    whole --grace "$grace" 1
    [[ $time_limit =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
      usage_error "--time=$time_limit: must be minutes, HH:MM:SS or D-HH:MM:SS"
    one_of --module "$module" atma_jax.train atma_jax.ablate atma_jax.evaluate
    [[ $# -gt 0 ]] || usage_error "TRAINING ARGUMENT is required: -- --config=FILE --workdir=DIR"
    if [[ $module == atma_jax.train ]]; then
      check_training "$python" "--check_for=gpu:$((nodes * gpus))" -- "$@"
    fi
    run mkdir -p "$root/runs/logs"
    run sbatch "--job-name=$name" "--nodes=$nodes" "--gpus-per-node=$gpus" "--ntasks-per-node=$gpus" \
      "--cpus-per-task=$cpus" "--time=$time_limit" "--signal=TERM@$grace" --requeue --open-mode=append \
      "--output=$root/runs/logs/$name.log" "--chdir=$root" ${passed[@]+"${passed[@]}"} \
      "$root/launch/slurm.sbatch" "--max-restarts=$max_restarts" -- "$python" -m "$module" "$@"
    ;;
  status) run squeue --me "--name=$name" ;;
  logs) run tail -n 100 -F "$root/runs/logs/$name.log" ;;
  # To the batch script as well, which then knows that it was cancelled.
  cancel) run scancel --me "--name=$name" --signal=TERM --full ;;
esac
