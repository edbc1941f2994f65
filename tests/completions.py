"""What every answer to a completion request must look like."""

from __future__ import annotations

import json
from typing import Any


def assert_well_formed(status: int, text: str, request: dict[str, Any]) -> None:
  """A refusal has a message, a stream ends as the protocol says, and every choice tells why it ended."""
  if status != 200:
    assert json.loads(text)["error"]["message"]
  elif request.get("stream"):
    assert text.endswith("data: [DONE]\n\n") and '"error"' not in text
  else:
    assert all(choice["finish_reason"] in ("stop", "length") for choice in json.loads(text)["choices"])
