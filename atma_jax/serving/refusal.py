"""How a request is refused: the protocol's error object, with the HTTP status that goes with it."""

from __future__ import annotations

from typing import Any


class ProtocolError(Exception):
  """A refused request.

  Attributes:
    status: of the HTTP answer.
    message: one line that says what is wrong and what is legal.
    param: the field of the body at fault, if it is one.
    code: what clients can test for, if there is such a code.
  """

  def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code

  def to_dict(self) -> dict[str, Any]:
    """Returns the body of the answer, the protocol's error object."""
    kinds = {429: "rate_limit_error", 404: "invalid_request_error"}
    kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
