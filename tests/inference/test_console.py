"""What `generate` shows beside the text."""

from __future__ import annotations

import logging

from atma_jax.inference.console import announce_compiling, hide_choices_of_kernels
from atma_jax.ops.core import dispatch


def test_compiling_is_announced_and_choices_of_kernels_are_not_shown(capsys, caplog):
  """The lines stay out of the text of a terminal; a training run, which does not call this, logs them."""
  logger = logging.getLogger(dispatch.LOGGER)
  before = logger.level
  try:
    with caplog.at_level(logging.INFO):
      logger.info("an op: 'xla' chosen before")
      hide_choices_of_kernels()
      announce_compiling()
      logger.info("an op: 'xla' chosen after")
  finally:
    logger.setLevel(before)
  shown = capsys.readouterr()
  assert shown.out == "" and shown.err.startswith("compiling the programs that read prompts")
  assert [record.getMessage() for record in caplog.records] == ["an op: 'xla' chosen before"]
