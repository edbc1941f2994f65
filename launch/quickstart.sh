#!/usr/bin/env bash
# From a fresh clone to a trained and evaluated model: environment, tokenizer, shards, training, evaluation, plots.
# Needs Python >= 3.11 and 8 to 15 minutes on 2 cores. Run it again to resume after an interruption.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  cat <<'USAGE'
usage: launch/quickstart.sh [--dry-run] [--workdir=DIR] [--config.FIELD=VALUE ...]
  --dry-run              print the commands, run none
  --workdir=DIR          where everything is written (runs/quickstart in the repository)
  --config.FIELD=VALUE   passed on to training, e.g. --config.model.attention=nope
environment variables: ATMA_VENV (directory of the environment, .venv-quickstart), PYTHON (interpreter it is made with)
USAGE
}

DRY_RUN=0
environment=$(absolute "${ATMA_VENV:-$root/.venv-quickstart}")
workdir=$root/runs/quickstart
overrides=()
for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=1 ;;
    --workdir=?*) workdir=$(absolute "${argument#*=}") ;;
    --config.?*=*) overrides+=("$argument") ;;
    --help | -h) usage && exit 0 ;;
    *) usage_error "unknown argument '$argument': legal are --dry-run, --workdir=DIR, --config.FIELD=VALUE, --help" ;;
  esac
done

run cd "$root"
prepare_environment "$environment" ""
run "$PYTHON" -m atma_jax.train --config=configs/quickstart.py "--workdir=$workdir" ${overrides[@]+"${overrides[@]}"}
run "$PYTHON" -m atma_jax.evaluate "--checkpoint=$workdir" --suite=loss,needle "--output=$workdir/evaluation"

if [[ $DRY_RUN == 0 ]]; then
  echo
  echo "Done in $SECONDS s."
  echo "  checkpoints  $workdir/checkpoints"
  echo "  metrics      $workdir/metrics.jsonl (TensorBoard files beside it)"
  echo "  evaluation   $workdir/evaluation (JSON lines)"
  find "$workdir/evaluation" -name '*.png' | sort | sed 's/^/  plot         /'
fi
