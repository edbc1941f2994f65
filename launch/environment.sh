# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: finds Python, makes an environment of the pinned versions, uses it again.
#
# The environment is wholly the scripts' own: it holds a stamp, which after a successful installation is a checksum of
# pyproject.toml and constraints.txt. With another stamp (an interrupted installation, changed pins) it is made anew;
# a directory without one is never touched.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)  # of the repository

usage_error() {  # message...
  echo "error: $*" >&2
  exit 2
}

absolute() {  # path, relative to where the script was called
  case $1 in
    /*) echo "$1" ;;
    *) echo "$PWD/$1" ;;
  esac
}

run() {  # command...: prints it and, unless DRY_RUN=1, runs it
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./=,:+-]+$ ]] || word=$(printf '%q' "$word")
    line+=" $word"
  done
  echo "${line# }"
  [[ $DRY_RUN == 1 ]] || "$@"
}

find_python() {  # sets PYTHON to the first interpreter that is new enough and can make environments
  local candidate candidates=(python3 python3.13 python3.12 python3.11 python)
  if [[ -n ${PYTHON:-} ]]; then
    candidates=("$PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      PYTHON=$candidate
      return
    fi
  done
  usage_error "no Python >= 3.11 with venv and ensurepip (tried ${candidates[*]}):" \
    "install one (Debian, Ubuntu: python3 python3-venv) or set PYTHON=/path/to/python"
}

prepare_environment() {  # directory, extra ("" or "[dev]"); sets PYTHON to the environment's interpreter
  local directory=$1 extra=$2 started=$SECONDS stamp found=none
  stamp="atma_jax$extra $(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | cksum)"
  if [[ -f $directory/atma-stamp ]]; then
    found=$(cat "$directory/atma-stamp")
  elif [[ -e $directory && -n $(ls -A "$directory") ]]; then
    usage_error "$directory (ATMA_VENV): must be absent, empty, or an environment that these scripts made"
  fi
  if [[ $found == "$stamp" ]] && "$directory/bin/python" -c '' 2>/dev/null; then
    echo "# environment $directory: up to date"
  else
    find_python
    echo "# environment $directory: installing with $("$PYTHON" --version), a minute or more"
    if [[ $DRY_RUN == 0 ]]; then
      mkdir -p "$directory"
      echo incomplete >"$directory/atma-stamp"
      find "$directory" -mindepth 1 -maxdepth 1 ! -name atma-stamp -exec rm -rf {} +
    fi
    run "$PYTHON" -m venv "$directory"
    run "$directory/bin/python" -m pip install -qq --disable-pip-version-check \
      --constraint launch/constraints.txt --editable ".$extra" || {
      echo "error: the installation into $directory failed; the same command starts it anew" >&2
      exit 1
    }
    if [[ $DRY_RUN == 0 ]]; then
      echo "$stamp" >"$directory/atma-stamp"
      echo "# environment $directory: installed in $((SECONDS - started)) s"
    fi
  fi
  PYTHON=$directory/bin/python
}
