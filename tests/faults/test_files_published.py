"""Published checkpoints from strangers: any value in any field of config.json, and files that are not what they are called."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from atma_jax.errors import UserError
from atma_jax.pytorch import model_config, read_published
from atma_jax.pytorch.archive import open_safetensors, open_state_dict

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "checkpoint_polar_mem1_win0"
FIELDS = [*sorted(json.loads((GOLDEN / "config.json").read_text())), "block_pattern", "logit_cap", "mem_max_half_life",
          "attn_null_length", "attn_direction_scale"]
ODD = st.sampled_from([None, True, -1, 0, 1, 3, 1e30, 2**31, 2**63, 1.5, -0.5, 1e-300, "x", "", [], [1], ["local"], [["local"]],
                       {}, {"a": 1}, "float128", "$x^$"])


@given(st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=2))
@settings(max_examples=150, deadline=None)
def test_configurations_of_other_types(tmp_path_factory, fields):
  """A configuration that fits the tensors, or one line that names the file."""
  path = tmp_path_factory.mktemp("published") / "config.json"
  path.write_text(json.dumps(json.loads((GOLDEN / "config.json").read_text()) | fields))
  try:
    model_config(path, open_state_dict(GOLDEN / "weights.pt"))
  except UserError as error:
    assert str(path) in str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 1000


@pytest.mark.parametrize("length", [1e30, 2**31, -5, "x", [], True])
def test_lengths_of_other_types(tmp_path, length):
  """The training length of a published configuration is a number of tokens."""
  folder = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "copy", copy_function=shutil.copyfile))
  values = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": length}
  (folder / "config.json").write_text(json.dumps(values))
  with pytest.raises(UserError, match="max_position_embeddings"):
    read_published(folder)


def test_safetensors_that_are_no_files(tmp_path):
  """A FIFO, a folder and random bytes."""
  os.mkfifo(tmp_path / "fifo.safetensors")
  (tmp_path / "folder.safetensors").mkdir()
  (tmp_path / "bytes.safetensors").write_bytes(b"\xff" * 64)
  (tmp_path / "empty.safetensors").write_bytes(b"")
  for name in ("fifo", "folder", "bytes", "empty", "absent"):
    with pytest.raises(UserError, match=rf"{name}\.safetensors: "):
      open_safetensors([tmp_path / f"{name}.safetensors"])
