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
    v5litepod-[0-9]*) echo v5e ;;
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
