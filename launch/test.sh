#!/usr/bin/env bash
# Installs what the tests need and runs them: on one CPU device, then tests/multidevice on eight fake ones.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  cat <<'USAGE'
usage: launch/test.sh [--dry-run] [--quick] [PATH ...] [PYTEST OPTION ...]
  --dry-run       print the commands, run none
  --quick         leave out the tests that are marked slow: three minutes on two cores
  PATH            test files, folders or file::test, relative to the repository; without any, all of them
  PYTEST OPTION   passed on, e.g. -x, -k NAME, -n 0 (one process; the default is one a core, four at most)
environment variables: ATMA_VENV (directory of the environment, .venv-test), PYTHON (interpreter it is made with)
USAGE
}

DRY_RUN=0
environment=$(absolute "${ATMA_VENV:-$root/.venv-test}")
single=()
multiple=()
options=()
for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=1 ;;
    --quick) options+=(-m "not slow") ;;
    --help | -h) usage && exit 0 ;;
    -*) options+=("$argument") ;;
    tests/multidevice*) multiple+=("$argument") ;;
    tests | tests/*) single+=("$argument") ;;
    *) options+=("$argument") ;;  # the value of an option
  esac
done
if [[ ${#single[@]} == 0 && ${#multiple[@]} == 0 ]]; then
  single=(tests)
  multiple=(tests/multidevice)
fi

failed=0
collected=0
suite() {  # number of CPU devices, pytest argument...
  local devices=$1 status=0
  shift
  # Small programs, run once or twice: most of the time would go into optimising them.
  local flags="--xla_force_host_platform_device_count=$devices --xla_backend_optimization_level=0"
  flags+=" --xla_llvm_disable_expensive_passes=true"
  run env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "XLA_FLAGS=$flags" \
    "$PYTHON" -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@" ${options[@]+"${options[@]}"} || status=$?
  case $status in
    0) collected=1 ;;
    5) ;;  # nothing collected, as -k may ask for
    *) failed=$status ;;
  esac
}

run cd "$root"
prepare_environment "$environment" "[dev]"
if [[ ${#single[@]} -gt 0 ]]; then
  suite 1 "${single[@]}" --ignore=tests/multidevice
fi
if [[ ${#multiple[@]} -gt 0 ]]; then
  suite 8 "${multiple[@]}"
fi
if [[ $failed == 0 && $collected == 0 ]]; then
  failed=5
fi
exit "$failed"
