"""The identity of a model's weights: which parameters a saved state belongs to."""

from __future__ import annotations

import hashlib
import json
import zlib

from flax import nnx
import jax
import numpy as np

from atma_jax.models import Atma


def weights_identity(model: Atma) -> str | None:
  """Returns a fingerprint of the names, shapes, dtypes and bits of all parameters.

  It is None if this process does not hold all of them. It costs one pass over the parameters on the host, about a second for a
  gigabyte, and their copy to it. A changed value always changes it. It tells weights apart that were mixed up; it is no
  protection from somebody who makes weights collide.
  """
  leaves = {".".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  if not all(x.is_fully_addressable for x in leaves.values()):
    return None
  described = [(name, x.shape, str(x.dtype), _checksum(x)) for name, x in sorted(leaves.items())]
  return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _checksum(x: jax.Array) -> int:
  return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
