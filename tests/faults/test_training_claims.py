"""Two processes and one working directory: the second is refused, a dead one's place is taken, and who has lost it ends."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import threading
import time
import types

import pytest

from atma_jax import claims
from atma_jax.claims import Claims, hold
from atma_jax.errors import RunError, UserError
from atma_jax.training import loop
from tests.faults import tiny_run
from tests.faults.test_training_signals import SLOWLY, wait_for

ELSEWHERE = {"host": "elsewhere 1", "pid": 7, "started": "1", "released": False}


def test_the_second_trainer_is_refused_and_a_killed_one_replaced(forking, main, tmp_path):
  tiny_run.prepared()
  arguments = ("train", f"--config={tiny_run.recipe_file()}", f"--workdir={tmp_path}")
  first = forking.start(*arguments, stderr=tmp_path / "stderr", first=SLOWLY)
  wait_for(tmp_path / "stderr", "step 2/8", first)
  second = main(*arguments)
  tiny_run.one_line(second, "in use by", f":{first.pid} ", "--workdir")
  assert first.poll() is None
  first.kill()
  first.wait(60)
  third = main(*arguments)
  assert third.returncode == 0 and "done: " in third.stderr, third.stderr


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
  hold(tmp_path, "--workdir").release()
  identity = json.loads((tmp_path / "claim.0").read_text()) | {"released": False}
  assert identity["pid"] == os.getpid()
  (tmp_path / "claim.0").write_text(json.dumps(identity))
  with pytest.raises(UserError, match=f"in use by .*:{os.getpid()} "):
    hold(tmp_path, "--workdir")
  (tmp_path / "claim.0").write_text(json.dumps(identity | {"started": "1"}))
  claim = hold(tmp_path, "--workdir")
  assert claim.path.name == "claim.1"
  claim.release()


def test_another_machine_is_judged_by_signs_of_life(tmp_path, monkeypatch):
  monkeypatch.setattr(claims, "STALE_SECONDS", 2.5)
  theirs = tmp_path / "claim.3"
  theirs.write_text(json.dumps(ELSEWHERE))
  ended = threading.Event()

  def beat():
    while not ended.wait(0.1):
      os.utime(theirs)

  thread = threading.Thread(target=beat)
  thread.start()
  with pytest.raises(UserError, match="in use by elsewhere:7 "):
    hold(tmp_path, "--workdir")
  ended.set()
  thread.join()
  began = time.monotonic()
  hold(tmp_path, "--workdir").release()
  assert 2.5 <= time.monotonic() - began < 10


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"{}", b'{"host": 1}', b"[" * 100_000,
                                     b'{"host": "x", "pid": "1", "started": null, "released": false}',
                                     b'{"host": "x", "pid": 1e999, "started": "1", "released": 0}'])
def test_a_claim_that_is_none_is_waited_out(tmp_path, monkeypatch, content):
  monkeypatch.setattr(claims, "STALE_SECONDS", 0.1)
  (tmp_path / "claim.5").write_bytes(content)
  claim = hold(tmp_path, "--workdir")
  assert claim.path.name == "claim.6"
  claim.release()
  assert Claims().owner(tmp_path) is None


def test_names_that_are_no_numbers_of_claims(tmp_path, monkeypatch):
  monkeypatch.setattr(claims, "STALE_SECONDS", 0.1)
  for name in ("claim.x", "claim.-1", "claim.9999999999999999999999", "claim."):
    (tmp_path / name).touch()
  os.mkfifo(tmp_path / "claim.12")
  hold(tmp_path, "--workdir").release()
  assert (tmp_path / "claim.13").exists()
  (tmp_path / "claim.999999999999999").touch()
  with pytest.raises(UserError, match="is no claim of this program"):
    hold(tmp_path, "--workdir")


def test_of_many_at_once_one_wins(tmp_path):
  barrier = threading.Barrier(8)

  def take(folder: pathlib.Path) -> claims.Claim | None:
    barrier.wait()
    return Claims().acquire(folder)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for number in range(20):
      (tmp_path / str(number)).mkdir()
      taken = list(pool.map(take, [tmp_path / str(number)] * 8, timeout=60))
      assert sum(claim is not None for claim in taken) == 1


def test_old_claims_are_cleared_away(tmp_path):
  for _ in range(30):
    hold(tmp_path, "--workdir").release()
  names = sorted(path.name for path in tmp_path.iterdir())
  assert len(names) < 12 and "claim.29" in names


def test_who_has_lost_the_directory_ends_without_touching_it(tmp_path, monkeypatch):
  tiny_run.prepared()
  monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
  original, calls = loop.Loop.next_batch, []

  def next_batch(self):
    calls.append(1)
    if len(calls) == 4:
      (tmp_path / "claim.1").write_text(json.dumps(ELSEWHERE))
      time.sleep(0.5)
    return original(self)

  monkeypatch.setattr(loop.Loop, "next_batch", next_batch)
  with pytest.raises(RunError, match="another process has taken over"):
    loop.train(tiny_run.recipe(), str(tmp_path))
  assert not pathlib.Path(tmp_path / "checkpoints" / "4").exists()
  assert json.loads((tmp_path / "claim.1").read_text()) == ELSEWHERE
  assert not json.loads((tmp_path / "claim.0").read_text())["released"]


class Stored:
  """An object store with generations, as TensorStore shows one; the claims of a remote folder need nothing else of it."""

  def __init__(self):
    self.value, self.generation, self.lock = None, 0, threading.Lock()

  def read(self, key):
    with self.lock:
      state = "missing" if self.value is None else "value"
      return self.done(types.SimpleNamespace(state=state, value=self.value, stamp=self.stamp()))

  def write(self, key, value, *, if_equal):
    with self.lock:
      if if_equal == self.stamp().generation:
        self.value, self.generation = value.encode(), self.generation + 1
      return self.done(self.stamp())

  def stamp(self):
    return types.SimpleNamespace(generation=str(self.generation).encode())

  def done(self, value):
    return types.SimpleNamespace(result=lambda: value)


@pytest.fixture
def stored(monkeypatch):
  """The object store of ``gs://bucket/run``."""
  store = Stored()
  monkeypatch.setattr("tensorstore.KvStore.open", lambda url: store.done(store))
  monkeypatch.setattr(claims, "STALE_SECONDS", 2.5)
  return store


def test_on_an_object_store_the_first_of_many_wins(stored):
  for _ in range(10):
    stored.value = None
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      taken = list(pool.map(lambda _: Claims().acquire("gs://bucket/run"), range(8), timeout=60))
    winners = [claim for claim in taken if claim is not None]
    assert len(winners) == 1
    with pytest.raises(UserError, match=f"--workdir: in use by .*:{os.getpid()} "):
      hold("gs://bucket/run", "--workdir")
    winners[0].release()
  hold("gs://bucket/run", "--workdir").release()
  assert json.loads(stored.value)["number"] == 1


def test_on_an_object_store_a_claim_is_renewed_lost_and_taken_over(stored, monkeypatch):
  stored.value = json.dumps(ELSEWHERE | {"number": 4}).encode()
  claim = hold("gs://bucket/run", "--workdir")  # after its time
  assert json.loads(stored.value)["number"] == 5
  monkeypatch.setattr(claims, "BEAT_SECONDS", 0.0)
  before = stored.generation
  assert claim.beat() and stored.generation > before
  stored.value = json.dumps(ELSEWHERE | {"number": 6}).encode()
  assert not claim.beat()
  claim.release()
  assert json.loads(stored.value) == ELSEWHERE | {"number": 6}
