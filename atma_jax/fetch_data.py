"""Fetches token shards that are ready to train on from the Hugging Face hub.

    python -m atma_jax.fetch_data --preset=fineweb-edu-gpt2-10B --output=DIR [--shards=N]

Every file is compared with the digest that the hub names. Files that are there and whole are kept, and one that was cut goes on
where it stopped, so the same command goes on after an interruption. HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import pathlib

from absl import flags

from atma_jax import cli
from atma_jax.config import INT32
from atma_jax.errors import UserError

_PRESET = flags.DEFINE_string("preset", None, "What to fetch: fineweb-edu-gpt2-10B or fineweb-gpt2-10B.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_SHARDS = flags.DEFINE_integer("shards", None, "Training shards to fetch, the first ones; default is all of them.", lower_bound=1,
                               upper_bound=INT32)


def main() -> None:
  """Fetches what is missing and says how to train on it. Raises `UserError` on bad flags."""
  from atma_jax.data import ready_shards  # only now, because a mistyped flag should be answered at once
  legal = "; ".join(f"{name} ({preset.help})" for name, preset in ready_shards.PRESETS.items())
  if not _PRESET.value:
    raise UserError(f"--preset=NAME is required: {legal}")
  if not _OUTPUT.value:
    raise UserError("--output=DIR is required: the folder to write")
  preset, folder = ready_shards.preset_of(_PRESET.value), pathlib.Path(_OUTPUT.value)
  print(ready_shards.summary(ready_shards.fetch(preset, folder, _SHARDS.value), preset, folder))


if __name__ == "__main__":
  cli.run(main)
