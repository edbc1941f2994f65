"""Metrics: what stands in the way is one line, foreign records are put aside, and TensorBoard's files are what it reads."""

from __future__ import annotations

import json
import os
import pathlib
import struct

from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from atma_jax.compilation_cache import use_compilation_cache
from atma_jax.errors import UserError
from atma_jax.training.metrics import MetricWriter, read_records
from atma_jax.training.workdir import make_workdir
from tests.faults.test_ablation_inputs import BROKEN


def write(folder: pathlib.Path, steps: range, first: int) -> MetricWriter:
  with MetricWriter(epath.Path(folder), first_step=first, active=True) as writer:
    for step in steps:
      writer.write(step, {"loss": 1.5 * step, "nothing": None, "far": float("inf")})
  return writer


def events(folder: pathlib.Path) -> list[event_pb2.Event]:
  """The events of TensorBoard's files, whose checksums are right."""
  found = []
  for path in sorted((folder / "tensorboard").iterdir()):
    content = path.read_bytes()
    while content:
      size, = struct.unpack("<Q", content[:8])
      lengths, content = content[:12], content[12:]
      assert struct.unpack("<I", lengths[8:])[0] == masked_crc32c(lengths[:8])
      assert struct.unpack("<I", content[size:size + 4])[0] == masked_crc32c(content[:size])
      found.append(event_pb2.Event.FromString(content[:size]))
      content = content[size + 4:]
  return found


def test_records_and_events(tmp_path):
  write(tmp_path, range(1, 6), 0)
  write(tmp_path, range(4, 8), 3)
  records, foreign = read_records(tmp_path / "metrics.jsonl")
  assert [record["step"] for record in records] == list(range(1, 8)) and foreign == 0
  assert records[2]["loss"] == 4.5 and records[2]["far"] is None and "nothing" not in records[2]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
  scalars = [(event.step, event.summary.value[0].simple_value) for event in events(tmp_path)
             if event.summary.value and event.summary.value[0].tag == "loss"]
  assert len(scalars) == 9 and set(scalars) == {(step, 1.5 * step) for step in range(1, 8)}
  starts = [event.step for event in events(tmp_path) if event.session_log.status == event_pb2.SessionLog.START]
  assert sorted(starts) == [0, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=30) | st.sampled_from([*BROKEN, b'{"step": 2}', b'{"step": 9}', b'{"step": true}']),
                max_size=6))
def test_foreign_lines_are_put_aside(tmp_path_factory, lines):
  folder = tmp_path_factory.mktemp("run")
  (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + b"\n".join(lines) + b"\n")
  write(folder, range(5, 7), 4)
  records, foreign = read_records(folder / "metrics.jsonl")
  assert foreign == 0 and records[0]["step"] == 1 and all(record["step"] <= 4 for record in records[:-2])
  assert [record["step"] for record in records[-2:]] == [5, 6]


@pytest.mark.parametrize("obstacle", ["metrics.jsonl", "tensorboard"])
def test_what_stands_in_the_way_is_named(tmp_path, obstacle):
  (tmp_path / "tensorboard").touch() if obstacle == "tensorboard" else (tmp_path / "metrics.jsonl").mkdir()
  with pytest.raises(UserError, match=f"{obstacle} cannot be written"):
    write(tmp_path, range(1), 0)


def test_a_fifo_is_no_file_of_metrics(tmp_path):
  os.mkfifo(tmp_path / "metrics.jsonl")
  with pytest.raises(UserError, match="not a regular file"):
    write(tmp_path, range(1), 0)


@pytest.mark.parametrize("choice", ["/proc/x", "FILE", "FILE/below"])
def test_a_compilation_cache_that_cannot_be_written_is_named(tmp_path, choice):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="--compilation_cache="):
    use_compilation_cache(choice.replace("FILE", str(tmp_path / "file")), str(tmp_path))


@pytest.mark.parametrize("workdir", ["foo://", "foo://bucket/run", "://", "s3x://a"])
def test_an_unknown_kind_of_path_is_named(workdir):
  with pytest.raises(UserError, match="legal: a path, or gs://BUCKET/PATH"):
    make_workdir(workdir)


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
  """The file may grow by three records and a half."""
  import resource
  write(tmp_path, range(1, 2), 0)
  size = (tmp_path / "metrics.jsonl").stat().st_size
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(3.5 * size), limits[1]))
    writer = write(tmp_path, range(1, 9), 0)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert writer.failed_writes >= 5
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3]
  events(tmp_path)
