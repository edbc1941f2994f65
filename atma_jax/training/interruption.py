"""SIGTERM and Ctrl-C: training saves and ends, or ends at once where there is nothing to save."""

from __future__ import annotations

from collections.abc import Callable
import os
import signal
import sys
import threading
import time

from absl import logging
import jax
from jax.experimental import multihost_utils

SAME_SECONDS = 0.5  # within which two signals are one
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Preemption:
  """SIGTERM or SIGINT (Ctrl-C), as a question asked after every step; several processes agree on the step.

  The first signal is answered by `reached`, once `begin` has been called; before that there is nothing to save, and the process
  ends at once with the exit code in `EXIT_CODES`. So it does on Ctrl-C after another signal; but a launcher may send SIGTERM more
  than once, or along with the SIGINT of a terminal, and SIGINT stays ignored if the launcher had it ignored.

  A thread receives the signals, because the main thread may be compiling for minutes, and Python runs handlers only between its
  own instructions. Outside the main thread nothing is handled. With several processes JAX receives SIGTERM, and SIGINT is passed
  on to it.
  """

  def __init__(self, leave: Callable[[], None]):
    """Handles nothing yet; the context does.

    Args:
      leave: called before the process ends at once, from another thread: gives back what others wait for.
    """
    self._leave = leave
    self._event = threading.Event()
    self._begun = False
    self._old: dict[int, object] = {}
    self._thread: threading.Thread | None = None
    self.signal: int | None = None  # the one that came

  def __enter__(self) -> Preemption:
    if threading.current_thread() is not threading.main_thread():
      return self
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    numbers = {signal.SIGTERM} if jax.process_count() == 1 else set()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
      numbers.add(signal.SIGINT)
    self._old = {number: signal.signal(number, lambda *_: None) for number in numbers}
    self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
    self._thread.start()
    return self

  def begin(self) -> None:
    """From now on a first signal is answered by `reached`."""
    self._begun = True

  def reached(self, step: int) -> bool:
    """Whether training must save and end after `step`."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._event.is_set()

  def _watch(self) -> None:
    came = 0.0
    while number := os.read(self._read, 1)[0]:
      if number not in self._old:
        continue
      name = signal.Signals(number).name
      again = self.signal is not None
      if again and (number != signal.SIGINT or time.monotonic() - came < SAME_SECONDS):
        continue
      if again or not (self._begun or jax.process_count() > 1):
        reason = "after another signal" if again else "before the first step, so there is nothing to save"
        print(f"{name} {reason}: ended at once; start the same command again", file=sys.stderr, flush=True)
        self._leave()
        os._exit(EXIT_CODES[signal.Signals(number)])
      self.signal, came = number, time.monotonic()
      logging.info("%s: saving after this step; Ctrl-C now ends at once", name)
      self._event.set()
      if jax.process_count() > 1:
        os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes

  def __exit__(self, *_: object) -> None:
    if self._thread is None:
      return
    for number, handler in self._old.items():
      signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what `signal.signal` returned
    signal.set_wakeup_fd(self._wakeup)
    os.write(self._write, b"\0")
    self._thread.join()
    os.close(self._read)
    os.close(self._write)
    self._old, self._thread = {}, None
