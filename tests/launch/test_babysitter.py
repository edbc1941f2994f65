"""launch/run.sh with children that crash, are pre-empted, refuse their input, or are told to stop."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
RUN = str(REPOSITORY / "launch" / "run.sh")

# Exits with the next code of its list at each start; counts the starts in a file, one time stamp a line.
CHILD = """
import pathlib, sys, time
starts = pathlib.Path(sys.argv[1])
with starts.open("a") as file:
  print(time.monotonic(), file=file)
codes = sys.argv[2:]
sys.exit(int(codes[min(len(starts.read_text().splitlines()), len(codes)) - 1]))
"""
# Saves on SIGTERM, as training does, a moment later; says when it is ready.
TRAINING = r"""
import os, signal, sys, time
def save(*_):
  os.write(1, b"saving\n")  # not print, which a signal may be interrupting
  time.sleep(0.5)
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
os.write(1, b"ready\n")
while True:
  time.sleep(0.05)
"""


def babysit(tmp_path: pathlib.Path, *codes: int, options: tuple[str, ...] = ("--backoff=0",)):
  """Exit code, stderr and the times of the starts of a child with these exit codes."""
  starts = tmp_path / "starts"
  done = subprocess.run(["bash", RUN, *options, "--", sys.executable, "-c", CHILD, str(starts), *map(str, codes)],
                        capture_output=True, text=True, timeout=30)
  return done.returncode, done.stderr, [float(line) for line in starts.read_text().splitlines()]


@pytest.mark.parametrize(("codes", "code", "starts"), [
  ((0,), 0, 1),
  ((2,), 2, 1),
  ((75, 0), 0, 2),
  ((1, 75, 139, 0), 0, 4),
  ((75, 2), 2, 2),
])
def test_restarts(tmp_path, codes, code, starts):
  """0 and 2 end it, everything else starts the command again."""
  returned, stderr, times = babysit(tmp_path, *codes)
  assert (returned, len(times)) == (code, starts)
  assert stderr.count("# run.sh: exit code") == starts - 1


@pytest.mark.parametrize("code", [1, 75])
def test_gives_up(tmp_path, code):
  """After as many restarts as allowed, with one line and the command's exit code."""
  returned, stderr, times = babysit(tmp_path, code, options=("--backoff=0", "--max-restarts=3"))
  assert (returned, len(times)) == (code, 4)
  assert stderr.splitlines()[-1] == (
    f"error: exit code {code}, and 3 restarts in a row did not help (--max-restarts=3)")


def test_backs_off(tmp_path):
  """Pauses double up to the longest one."""
  _, stderr, times = babysit(tmp_path, 1, 1, 1, 0, options=("--backoff=1", "--max-backoff=2"))
  assert [line.rsplit(" in ", 1)[1] for line in stderr.splitlines()] == ["1 s", "2 s", "2 s"]
  assert [later - earlier >= pause for earlier, later, pause in zip(times, times[1:], (1, 2, 2))] == [True] * 3


def test_a_long_run_starts_the_count_anew(tmp_path):
  """Only quick failures in a row count."""
  script = f"{CHILD.replace('codes = ', 'time.sleep(1.2); codes = ')}"
  starts = tmp_path / "starts"
  done = subprocess.run(["bash", RUN, "--backoff=0", "--max-restarts=1", "--stable=1", "--",
                         sys.executable, "-c", script, str(starts), "1", "1", "0"],
                        capture_output=True, text=True, timeout=30)
  assert (done.returncode, len(starts.read_text().splitlines())) == (0, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 3])
def test_signals_reach_the_command(number, times):
  """As SIGTERM; the command's own exit code comes back, however often it is sent, and nothing restarts."""
  running = subprocess.Popen(["bash", RUN, "--backoff=0", "--", sys.executable, "-c", TRAINING], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in the background
  assert running.stdout.readline() == "ready\n"
  for _ in range(times):
    running.send_signal(number)
    time.sleep(0.1)
  out, err = running.communicate(timeout=20)
  assert (running.returncode, err) == (75, "")
  assert set(out.splitlines()) == {"saving"}


def test_a_signal_ends_the_pause(tmp_path):
  """Between two runs it ends at once, with the last exit code."""
  running = subprocess.Popen(["bash", RUN, "--backoff=60", "--", "bash", "-c", "exit 3"], text=True,
                             stderr=subprocess.PIPE)
  assert "restart 1 of 10 in 60 s" in running.stderr.readline()
  began = time.monotonic()
  running.terminate()
  running.communicate(timeout=20)
  assert running.returncode == 3
  assert time.monotonic() - began < 10


def test_exports_the_flags_of_a_generation():
  """After those that are already set."""
  done = subprocess.run(["bash", RUN, "--generation=v6e", "--", "bash", "-c", 'echo "$LIBTPU_INIT_ARGS"'],
                        capture_output=True, text=True, env=os.environ | {"LIBTPU_INIT_ARGS": "--mine=1"})
  assert done.stdout.startswith("--mine=1 --xla_tpu_")


def test_dry_run():
  """The flags and the command, quoted."""
  done = subprocess.run(["bash", RUN, "--dry-run", "--generation=gpu", "--", "touch", "/no/such dir/file"],
                        capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"})
  first, second = done.stdout.splitlines()
  assert first.startswith("export XLA_FLAGS=--xla_gpu")
  assert second == r"touch /no/such\ dir/file"


@pytest.mark.parametrize(("codes", "options", "returned", "starts"), [
  ((2, 0), (), 2, ["--check"]), ((0, 0), (), 0, ["--check", ""]), ((1, 0), (), 0, ["--check", ""]),
  ((0,), ("--no-check",), 0, [""]),
])
def test_training_is_checked_first(tmp_path, codes, options, returned, starts):
  """Once; bad input ends it there."""
  python = tmp_path / "python"
  python.write_text(f"""#!/bin/bash
echo "${{*:4}}" >>{tmp_path}/starts
codes=({" ".join(map(str, codes))})
exit "${{codes[$(wc -l <{tmp_path}/starts) - 1]}}"
""")
  python.chmod(0o755)
  done = subprocess.run(["bash", RUN, "--backoff=0", *options, "--", str(python), "-m", "atma_jax.train", "--config=x"],
                        capture_output=True, text=True, timeout=30)
  assert (done.returncode, (tmp_path / "starts").read_text().split("\n")[:-1]) == (returned, starts), done.stderr
