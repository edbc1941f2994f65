#!/usr/bin/env bash
# Runs a command on this machine and starts it again when it crashes or was pre-empted (exit code 75).
set -euo pipefail

# shellcheck source=launch/options.sh
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

usage() {
  cat <<'USAGE'
usage: launch/run.sh [OPTION ...] -- COMMAND [ARGUMENT ...]
  --generation=NAME    exports the compiler flags of v4, v5e, v5p, v6e, tpu7x or gpu (launch/xla_flags.sh)
  --max-restarts=N     quick failures in a row before it gives up (10); 0 never restarts
  --backoff=SECONDS    pause before the first restart (5), doubled for each further quick failure
  --max-backoff=SECONDS  the longest pause (300)
  --stable=SECONDS     a run at least this long is no quick failure: the count and the pause start anew (600)
  --no-check           do not look first, once, for what would make `python -m atma_jax.train` fail (its --check)
  --dry-run            print what would be run
Exit code: the command's, or 2 of the check. 0 (done) and 2 (bad input) end it; any other restarts. SIGTERM or SIGINT reaches the command as
SIGTERM, on which training saves and exits 75, and is never followed by a restart.
Example: launch/run.sh -- python -m atma_jax.train --config=configs/quickstart.py --workdir=runs/mine
USAGE
}

DRY_RUN=0
generation=
max_restarts=10
backoff=5
max_backoff=300
stable=600
CHECK=1
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --generation=?*) generation=${1#*=} ;;
    --max-restarts=?*) max_restarts=${1#*=} ;;
    --backoff=?*) backoff=${1#*=} ;;
    --max-backoff=?*) max_backoff=${1#*=} ;;
    --no-check) CHECK=0 ;;
    --stable=?*) stable=${1#*=} ;;
    --help | -h) usage && exit 0 ;;
    *)
      usage_error "unknown argument '$1': legal are --generation=, --max-restarts=, --backoff=, --max-backoff=," \
        "--stable=, --no-check, --dry-run, --help, then -- COMMAND"
      ;;
  esac
  shift
done
[[ $# -gt 1 ]] || usage_error "COMMAND is required: -- COMMAND [ARGUMENT ...]"
shift
[[ -z $generation ]] || one_of --generation "$generation" v4 v5e v5p v6e tpu7x gpu
whole --max-restarts "$max_restarts" 0
whole --backoff "$backoff" 0
whole --max-backoff "$max_backoff" 0
whole --stable "$stable" 1

if [[ -n $generation ]]; then
  flags=$(bash "$root/launch/xla_flags.sh" "$generation")
  variable=${flags%%=*}
  flags="${!variable:+${!variable} }${flags#*=}"  # after what is already set
  [[ $DRY_RUN == 0 ]] || echo "export $(quoted "$variable=$flags")"
  export "$variable=$flags"
fi
if [[ $DRY_RUN == 1 ]]; then
  quoted "$@"
  exit 0
fi

if [[ $CHECK == 1 && " $* " == *" -m atma_jax.train "* ]]; then
  status=0
  "$@" --check || status=$?
  [[ $status != 2 ]] || exit 2  # anything else may pass, and training says so itself
fi

say() {
  echo "# run.sh: $*" >&2
}

child=
stopping=0
interrupted=0
# shellcheck disable=SC2329  # called by the trap
on_signal() {
  stopping=1
  interrupted=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap on_signal TERM INT

start() {  # command...: sets `child`; a signal that came before it could know of the child is not lost
  "$@" <&0 &
  child=$!
  [[ $stopping == 0 ]] || on_signal
}

await() {  # sets `status` to the exit code of `child`, however many signals arrive meanwhile
  interrupted=1
  while [[ $interrupted == 1 ]]; do
    interrupted=0
    status=0
    wait "$child" || status=$?
  done
  child=
}

failures=0
status=143  # if stopped before the first start
while [[ $stopping == 0 ]]; do
  started=$SECONDS
  start "$@"
  await
  [[ $stopping == 0 && $status != 0 && $status != 2 ]] || break
  ((SECONDS - started < stable)) || failures=0
  if ((failures >= max_restarts)); then
    echo "error: exit code $status, and $failures restarts in a row did not help (--max-restarts=$max_restarts)" >&2
    break
  fi
  pause=$backoff
  for ((i = 0; i < failures && pause < max_backoff; i++)); do
    pause=$((2 * pause))
  done
  ((pause <= max_backoff)) || pause=$max_backoff
  failures=$((failures + 1))
  say "exit code $status after $((SECONDS - started)) s; restart $failures of $max_restarts in $pause s"
  ended=$status
  start sleep "$pause"
  await
  status=$ended
done
exit "$status"
