"""Standard errors of means, confidence intervals of proportions, and logarithmic bins."""

from __future__ import annotations

import math
from statistics import NormalDist

from jaxtyping import Float, Int
import numpy as np


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
  """The Wilson score interval of a proportion (Wilson 1927), which stays within [0, 1] and has a width even at 0 and n."""
  if not 0 <= successes <= n or n == 0:
    raise ValueError(f"successes={successes}: must be from 0 to n={n}, and n at least 1")
  return _wilson(successes / n, n, confidence)


def _wilson(p: float, n: float, confidence: float) -> tuple[float, float]:
  z = NormalDist().inv_cdf((1 + confidence) / 2)
  shrink = 1 + z * z / n
  center = (p + z * z / (2 * n)) / shrink
  half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return 0.0 if p == 0 else max(0.0, center - half), 1.0 if p == 1 else min(1.0, center + half)


def clustered_wilson_interval(right: Int[np.ndarray, " rows"], questions: int) -> tuple[float, float]:
  """The Wilson interval of a share of questions, several of which share a row and so are not independent.

  The number of questions is divided by the design effect, the variance of the rows' shares over what it would be if all
  questions were independent, but at least 1 (Kish 1965). With one question a row this is `wilson_interval`.

  Args:
    right: questions answered of each row.
    questions: asked of each row.
  """
  share, rows = float(np.mean(right)) / questions, len(right)
  effect = 1.0
  if questions > 1 and rows > 1 and 0 < share < 1:
    effect = max(1.0, float(np.var(np.asarray(right) / questions, ddof=1)) * questions / (share * (1 - share)))
  n = rows * questions / min(effect, questions)
  return _wilson(share, n, 0.95)


def mean_and_error(samples: Float[np.ndarray, " n"]) -> tuple[float, float | None]:
  """The mean of independent samples and its standard error, which is None for a single sample."""
  samples = np.asarray(samples, np.float64)
  error = samples.std(ddof=1) / math.sqrt(len(samples)) if len(samples) > 1 else None
  return float(samples.mean()), None if error is None else float(error)


def clustered_mean_and_error(samples: Float[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> tuple[float, float | None]:
  """The mean of samples, and its standard error if samples of the same cluster depend on each other, None for one cluster.

  With N samples, G clusters and R_g the summed deviations from the mean in cluster g, the variance of the mean is
  ``G / (G - 1) sum(R_g^2) / N^2``. Where every cluster holds one sample, that is the error of `mean_and_error`.
  """
  samples = np.asarray(samples, np.float64)
  mean = samples.mean()
  names, index = np.unique(clusters, return_inverse=True)
  if (count := len(names)) < 2:
    return float(mean), None
  sums = np.bincount(index, samples - mean, count)
  return float(mean), math.sqrt(count / (count - 1) * float(np.sum(sums**2))) / len(samples)


def log_spaced_edges(length: int, per_octave: int = 4) -> Int[np.ndarray, " edges"]:
  """Strictly increasing bin edges from 0 to `length`: `per_octave` bins per doubling, none narrower than a token."""
  octaves = math.log2(length)
  edges = np.rint(2 ** np.linspace(0, octaves, max(1, round(octaves * per_octave)) + 1)).astype(int)
  return np.unique(np.concatenate([[0], edges]))
