# shellcheck shell=bash
# Sourced by the launchers: option checks and what a TPU generation is called where.
# Bad input is one line on stderr that names the option and what is legal, and exit code 2.

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

need() {  # option, its value, what is legal
  [[ -n $2 ]] || usage_error "$1 is required: $3"
}

whole() {  # option, its value, smallest legal value
  if [[ ! $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
    usage_error "$1=$2: must be a whole number, $3 or more"
  fi
}

one_of() {  # option, its value, legal value...
  local given=$2 value
  local option=$1
  shift 2
  for value in "$@"; do
    [[ $given != "$value" ]] || return 0
  done
  usage_error "$option=$given: legal are $*"
}

resource_name() {  # option, its value: what the clouds take as a name
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    usage_error "$1=$2: must be up to 40 lower-case letters, digits and '-', starting with a letter, not ending in '-'"
}

accelerator_generation() {  # v6e-16, v5litepod-16: prints the generation, or nothing
  case $1 in
    v4-[0-9]* | v5p-[0-9]* | v6e-[0-9]* | tpu7x-[0-9]*) echo "${1%%-*}" ;;
    v5litepod-[0-9]* | v5e-[0-9]*) echo v5e ;;
  esac
}

quoted() {  # word...: one shell-quoted line
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./=,:+-]+$ ]] || word=$(printf '%q' "$word")
    line+=" $word"
  done
  echo "${line# }"
}

devices_of() {  # accelerator type, slices: prints KIND:DEVICES:SLICES, as JAX counts devices, for train --check_for
  local generation shape=${1#*-} devices=1 size
  generation=$(accelerator_generation "$1")
  for size in ${shape//x/ }; do
    devices=$((devices * 10#$size))
  done
  case $generation:$shape in
    *:*x*) [[ $generation != tpu7x ]] || devices=$((2 * devices)) ;;  # a topology counts chips
    v4:* | v5p:*) devices=$((devices / 2)) ;;                         # the type counts TensorCores, of which a device has two
  esac
  echo "$generation:$((devices * $2)):$2"
}

check_training() {  # interpreter ("" finds one), check flag..., --, training argument...: stops the launcher if the run would fail
  local interpreter=$1 candidate check_flags=() status=0
  shift
  while [[ $1 != -- ]]; do
    check_flags+=("$1")
    shift
  done
  shift
  [[ $CHECK == 1 ]] || return 0
  for candidate in $interpreter ${PYTHON:-} "$root/.venv/bin/python" python3 python; do
    [[ $candidate != */* ]] || candidate=$(absolute "$candidate")
    if (cd "$root" && "$candidate" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("atma_jax", "jax", "grain"))))') \
      >/dev/null 2>&1; then
      (cd "$root" && run "$candidate" -m atma_jax.train --check "${check_flags[@]}" "$@") || status=$?
      [[ $status == 0 ]] || {
        echo "# nothing was started; --no-check starts it without the check" >&2
        exit "$status"
      }
      return 0
    fi
  done
  echo "# not checked: no Python here has atma_jax with what it needs (PYTHON names one); --no-check hides this line" >&2
}
