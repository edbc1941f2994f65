"""Workers that share a directory: no cell runs twice or is lost, failures are kept, cells of a dead worker are taken over.

The process of a cell is a stand-in that writes what it does into a file; test_ablate.py has the real one.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from atma_jax import claims
from atma_jax.ablation import jobs
from atma_jax.ablation.grid import expand, make_axis
from atma_jax.ablation.sweep import CellFolder, Evaluation, create, find
from atma_jax.ablation.worker import FAILED, FINISHED, Worker, remaining_time
from atma_jax.claims import Claims
from atma_jax.config import Config
from atma_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
CELL = """
import json, os, pathlib, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
(folder / "ran").open("a").write(f"{os.getpid()} start\\n")
time.sleep(seconds)
if folder.name == "win-3" and not (folder / "mended").exists():
  sys.exit("error: no luck")
(folder / "ran").open("a").write(f"{os.getpid()} end\\n")
(folder / "result.json").write_text(json.dumps({"seconds": seconds}))
"""
WORKER = f"""
import ctypes, pathlib, sys
from atma_jax.ablation.sweep import find
from atma_jax.ablation.worker import Worker
PROGRAM = {CELL!r}.replace("folder, seconds", "__import__('ctypes').CDLL(None).prctl(1, 9); folder, seconds", 1)
command = lambda folder: [sys.executable, "-c", PROGRAM, str(folder.path), sys.argv[2]]
print(Worker(find(pathlib.Path(sys.argv[1])), command).run())
"""


def command(folder: CellFolder) -> list[str]:
  return [sys.executable, "-c", CELL, str(folder.path), "0.05"]


def sweep(path: pathlib.Path, count: int) -> list[CellFolder]:
  return create(path, expand([make_axis("model.window", range(1, count + 1))], Config()), Evaluation())


def starts(cells) -> list[int]:
  return [(cell.path / "ran").read_text().count("start") for cell in cells]


def start_worker(path: pathlib.Path, seconds: float) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, "-c", WORKER, str(path), str(seconds)], cwd=REPOSITORY, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def wait_for(condition) -> None:
  deadline = time.monotonic() + 120
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.slow
def test_four_workers_run_every_cell_once(tmp_path):
  cells = sweep(tmp_path, 6)
  (cells[2].path / "mended").touch()
  workers = [start_worker(tmp_path, 0.1) for _ in range(4)]
  assert [w.communicate(timeout=120)[0].strip() for w in workers] == [FINISHED] * 4
  assert starts(cells) == [1] * 6 and all(cell.done for cell in cells)


def test_failure_is_kept_and_retried_on_request(tmp_path):
  cells = sweep(tmp_path, 4)
  assert Worker(cells, command, parallel=2).run() == FAILED
  assert [cell.done for cell in cells] == [True, True, False, True]
  assert cells[2].failure() == {"error": "error: no luck", "exit_code": 1, "attempt": 1}
  assert Worker(cells, command).run() == FAILED and starts(cells) == [1, 1, 1, 1]
  assert Worker(cells, command, retry_failed=True).run() == FAILED and starts(cells) == [1, 1, 2, 1]
  assert cells[2].failure()["attempt"] == 2
  (cells[2].path / "mended").touch()
  assert Worker(cells, command, retry_failed=True).run() == FINISHED and starts(cells) == [1, 1, 3, 1]
  assert sorted(path.name for path in cells[2].path.glob("failed*")) == ["failed-1.json", "failed-2.json"]


def test_killed_worker_takes_its_cell_along_and_the_next_goes_on(tmp_path):
  cells = sweep(tmp_path, 2)
  worker = start_worker(tmp_path, 60)
  wait_for(lambda: (cells[0].path / "ran").exists() and starts(cells[:1]) == [1])  # and is written
  child = int((cells[0].path / "ran").read_text().split()[0])
  assert Claims().owner(cells[0].path).endswith(f":{worker.pid}")
  worker.send_signal(signal.SIGKILL)
  worker.wait()
  wait_for(lambda: claims.process_start(child) is None)  # no orphan trains on
  assert Claims().owner(cells[0].path) is None
  assert Worker(cells, command).run() == FINISHED
  assert starts(cells) == [2, 1]


def test_sigterm_ends_the_cells_and_frees_them(tmp_path):
  cells = sweep(tmp_path, 1)
  worker = start_worker(tmp_path, 60)
  wait_for(lambda: (cells[0].path / "ran").exists() and starts(cells[:1]) == [1])  # and is written
  worker.terminate()
  assert worker.communicate(timeout=60)[0].strip() == "preempted"
  assert Claims().owner(cells[0].path) is None and cells[0].failure() is None


def test_claims_of_another_machine_are_judged_by_their_heartbeat(tmp_path, monkeypatch):
  """Only changes that this process has seen count; the time of a file, however old, says nothing."""
  monkeypatch.setattr(claims, "STALE_SECONDS", 0.2)
  theirs = tmp_path / "claim.4"
  theirs.write_text(json.dumps({"host": "elsewhere 1", "pid": 1, "started": "1", "released": False}))
  os.utime(theirs, (10, 10))
  mine = Claims()
  assert mine.acquire(tmp_path) is None and mine.owner(tmp_path) == "elsewhere:1" and not mine.beating(tmp_path)
  time.sleep(0.15)
  os.utime(theirs, (20, 20))
  assert mine.acquire(tmp_path) is None and mine.beating(tmp_path)
  time.sleep(0.25)
  claim = mine.acquire(tmp_path)
  assert claim.path.name == "claim.5" and Claims().acquire(tmp_path) is None
  assert claim.beat()
  (tmp_path / "claim.6").touch()
  assert not claim.beat()  # another process took it
  (tmp_path / "claim.6").unlink()
  claim.release()
  assert Claims().acquire(tmp_path).path.name == "claim.6"


def test_a_sweep_keeps_its_settings(tmp_path):
  cells = sweep(tmp_path, 2)
  assert [cell.id for cell in find(tmp_path)] == [cell.id for cell in cells] and sweep(tmp_path, 2)
  config = Config()
  config.train.steps = 7
  with pytest.raises(UserError, match=r"win-1 exists with another setting, config\.train\.steps=18722 there, 7 here"):
    create(tmp_path, expand([make_axis("model.window", (1,))], config), Evaluation())
  with pytest.raises(UserError, match=r"evaluation\.trials=24 there, 5 here"):
    create(tmp_path, expand([make_axis("model.window", (1,))], Config()), Evaluation(trials=5))
  shared = {cell.config().data.directory for cell in cells}
  assert len(shared) == 1 and pathlib.Path(shared.pop()).parent == tmp_path / "data"


def test_eta_counts_what_running_cells_have_trained(tmp_path):
  cells = sweep(tmp_path, 3)
  assert (remaining_time([], cells, 0), remaining_time([], cells, 2)) == ("once a cell runs", "after the first steps")
  assert remaining_time(cells, [], 0) == "0:00:00" and cells[0].last_record() is None
  records = ['{"step": 9361, "seconds_per_step": 0.01, "loss": 2.5}', '{"step": 9361, "validation/loss": 2}', '{"st']
  (cells[0].path / "metrics.jsonl").write_text("\n".join(records))
  assert cells[0].progress() == (0.5, 187.22)
  assert str(cells[0].last_record()) == "step 9361/18722, loss 2.500"
  assert remaining_time([], cells, 2) == "0:03:54 of training, and the evaluation"  # two cells and a half, two at a time
  (cells[2].path / "result.json").write_text('{"seconds": 100}')
  assert remaining_time(cells[2:], cells[:2], 1) == "0:02:30"


def test_jobs_are_launcher_commands(tmp_path):
  """All launchers accept the names of the jobs, and their dry runs accept the commands."""
  cells = sweep(tmp_path, 2)
  for kind, options, words in (
      ("slurm", ["--time=1:00:00"], ["sbatch", "--ntasks-per-node=1", "-m atma_jax.ablate", "--cells=win-1"]),
      ("xpk", ["--cluster=c", "--zone=us-east5-b", "--tpu-type=v6e-1", "--image=i:1"],
       ["xpk workload create", "-m\\ atma_jax.ablate", "--cells=win-1"])):
    line = jobs.job_command(kind, cells[0], "runs/s", options)
    split = line.index("--")
    line.insert(split, "--dry-run")
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in words), done.stdout
  names = {jobs.job_name(cell.id) for cell in cells}
  assert len(names) == 2 and all(len(name) <= 28 for name in names)
