"""ATMA: length-invariant language models in JAX/Flax."""

import time

STARTED = time.perf_counter()  # as good as the start of the process: what takes long is imported after this
