"""The model ``atma_jax`` of the lm-evaluation-harness, for its base tasks, RULER, BABILong and local tasks.

Every request starts with exactly one end-of-text, as documents do in training, and is never cut: a request longer than
``max_length`` is an error, and without ``max_length`` any length is read (rows beyond ``prefill_chunk`` piece by piece). Rows
are padded on the right to a few lengths and scored in batches of equal size, so that few programs are compiled. The model is
causal, so the results depend on neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
import numpy as np

from atma_jax.checkpoints.load import load_model, overridden
from atma_jax.checkpoints.overrides import OVERRIDES, checked_overrides
from atma_jax.errors import UserError, unknown_name
from atma_jax.evaluation.decoding import make_engine
from atma_jax.evaluation.scoring import Scorer, batch_devices
from atma_jax.inference.sampling import Sampling
from atma_jax.progress import progress_bar
from atma_jax.sharding import make_mesh

_SHORTEST_ROW, _FEWEST_POSITIONS = 32, 8
_MODEL_ARGUMENTS = ("checkpoint", "step", "max_length", "max_gen_toks", "batch_tokens", "chunk", "prefill_chunk", "fsdp",
                    "tensor", "keep_window", "ema", *OVERRIDES, "tokenizer")
_GENERATION_OPTIONS = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
                       "max_gen_toks", "max_new_tokens", "max_tokens")
_CACHED_TOKENS = 65_536  # most tokens of all caches together


@register_model("atma_jax")
class AtmaLM(TemplateLM):
  """``--model atma_jax --model_args checkpoint=DIR[,step=N,max_length=N,...]``.

  Args:
    checkpoint: a training workdir, or its checkpoints folder.
    step: None is the newest good one.
    batch_size: rows that are scored or decoded at once, rounded up to a multiple of the devices; "auto" goes by `batch_tokens`.
    max_length: most tokens of a request, the first end-of-text included; None is any number. It is also the window of
      `loglikelihood_rolling`, which reads whole documents without it.
    max_gen_toks: most new tokens for tasks that do not say.
    batch_tokens: tokens of a batch on each device for ``batch_size=auto``.
    chunk: time steps whose logits exist at once.
    prefill_chunk: most tokens of a row in one pass.
    fsdp, tensor: devices along these axes of the mesh; all others are spread over rows.
    keep_window: keep the attention window of training; otherwise every token is visible.
    ema: the moving average of the weights (config.train.ema_decay) instead of the weights.
    tokenizer: ignored; tasks that make text of a given length (RULER) read the name of a tokenizer from it.
    device, max_batch_size: ignored; the harness passes them for PyTorch, and JAX uses the devices that it sees.
    **overrides: fields of the model that `atma_jax.checkpoints.load.load_model` can override, such as ``null_length``.
  """

  def __init__(self, checkpoint: str | None = None, step: int | None = None, batch_size: int | str = 1,
               max_length: int | None = None, max_gen_toks: int = 256, batch_tokens: int = 8192, chunk: int = 512,
               prefill_chunk: int = 65_536, fsdp: int = 1, tensor: int = 1, keep_window: bool = False, ema: bool = False,
               tokenizer: str | None = None, device: str | None = None, max_batch_size: int | None = None,
               **overrides: Any):
    super().__init__()
    for name in overrides:
      if name not in OVERRIDES:
        raise UserError(unknown_name("--model_args field", name, _MODEL_ARGUMENTS))
    if not checkpoint:
      raise UserError("--model_args: checkpoint=DIR is required")
    del device, max_batch_size, tokenizer
    self._batch_size = _parse_batch_size(batch_size)
    for name, value in (("max_length", max_length), ("max_gen_toks", max_gen_toks), ("batch_tokens", batch_tokens),
                        ("chunk", chunk), ("prefill_chunk", prefill_chunk), ("fsdp", fsdp), ("tensor", tensor)):
      if value is not None and (not isinstance(value, int) or value < 1):
        raise UserError(f"--model_args {name}={value}: must be a whole number of at least 1")
    checked_overrides(overrides, "--model_args ")
    if keep_window and "window" in overrides:
      raise UserError("--model_args keep_window, window: only one of them can be given")
    try:
      self._mesh = make_mesh(fsdp=fsdp, tensor=tensor)
    except ValueError as error:
      raise UserError(f"--model_args fsdp={fsdp},tensor={tensor}: {error}") from error
    loaded = load_model(checkpoint, step, self._mesh, ema=ema, overrides=overrides)
    self._tokenizer, self.step = loaded.tokenizer, loaded.step
    keeps_window = keep_window or "window" in overrides
    self._model = loaded.model if keeps_window else overridden(loaded.model, {"window": None})
    self._limit, self._default_new_tokens, self._batch_tokens = max_length, max_gen_toks, batch_tokens
    self.scorer = Scorer(self._model, self._mesh, batch_tokens=batch_tokens, chunk=chunk, prefill_chunk=prefill_chunk)

  @property
  def eot_token_id(self) -> int:
    return self._tokenizer.eot_id

  @property
  def tokenizer_name(self) -> str:
    """A name by which the harness tells its caches of requests apart."""
    return f"atma_jax-{self._tokenizer.fingerprint[:16]}"

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    """Encodes a text, without end-of-text."""
    del add_special_tokens, kwargs
    return self._tokenizer.encode(string).tolist()

  def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """The log-probability of each continuation given its context, in nats, and whether greedy decoding would give it."""
    pairs = []
    for request in requests:
      context, continuation = cast(tuple[str, str], request.args)
      encoded = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
      pairs.append((request.args, *encoded))
    return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

  def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                            **kwargs: Any) -> list[tuple[float, bool]]:
    """`loglikelihood` of tokens, whose first end-of-text is added here."""
    del kwargs
    results = self._score([([self.eot_token_id, *context], continuation) for _, context, continuation in requests], disable_tqdm)
    for (arguments, _, _), result in zip(requests, results):
      self.cache_hook.add_partial("loglikelihood", arguments, result)
    return results

  def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
    """The log-probability of each whole text, in nats; with a `max_length`, in windows that score each token once."""
    pairs, owners = [], []
    for owner, request in enumerate(requests):
      tokens = self.tok_encode(request.args[0])
      if self._limit is None:
        windows = [([self.eot_token_id], tokens)]
      else:
        windows = map(make_disjoint_window, get_rolling_token_windows(
          token_list=tokens, prefix_token=self.eot_token_id, max_seq_len=self._limit, context_len=1))
      for context, continuation in windows:
        pairs.append((list(context), list(continuation)))
        owners.append(owner)
    totals = np.zeros(len(requests))
    for owner, (value, _) in zip(owners, self._score(pairs, disable_tqdm)):
      totals[owner] += value
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
    return totals.tolist()

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """The text after each context, up to end-of-text, a text of ``until`` or ``max_gen_toks``; greedy unless ``do_sample``."""
    jobs: dict[int, list[int]] = {}
    prompts, samplings = [], []
    for index, request in enumerate(requests):
      context, options = cast(tuple[str, dict[str, Any]], request.args)
      prompts.append([self.eot_token_id, *self.tok_encode(context)])
      samplings.append(self._sampling(options))
      length = len(prompts[-1]) + samplings[-1].max_tokens
      self._check_length(length, "prompt and new tokens")
      jobs.setdefault(_bucket(length, _SHORTEST_ROW), []).append(index)
    texts = [""] * len(requests)
    bar = progress_bar(len(requests), " requests", description="generate_until", scale=False, enabled=not disable_tqdm)
    with bar, jax.set_mesh(self._mesh):
      for capacity, indices in sorted(jobs.items(), reverse=True):
        rows = min(64, max(1, _CACHED_TOKENS // capacity)) if self._batch_size is None else self._batch_size
        engine = make_engine(self._model, self._tokenizer, self._mesh, rows=rows, capacity=capacity)
        for output in engine.stream([prompts[i] for i in indices], [samplings[i] for i in indices]):
          texts[indices[output.request]] += output.text
          bar.update(output.finish_reason is not None)
    for request, text in zip(requests, texts):
      self.cache_hook.add_partial("generate_until", request.args, text)
    return texts

  def _score(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[tuple[float, bool]]:
    """For each pair of context and continuation, the log-probability of the continuation, and whether it is greedy."""
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)  # the result of an empty continuation
    jobs: dict[tuple[int, int], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
      if not continuation:
        continue
      self._check_length(len(context) + len(continuation) - 1, "context and continuation")
      length = _bucket(len(context) + len(continuation), _SHORTEST_ROW)
      count = min(_bucket(len(continuation), _FEWEST_POSITIONS, halves=False), length - 1)
      jobs.setdefault((length, count), []).append(index)
    with progress_bar(len(pairs), " requests", description="loglikelihood", scale=False, enabled=not disable_tqdm) as bar:
      for (length, count), indices in sorted(jobs.items(), reverse=True):
        rows = np.full((len(indices), length), self.eot_token_id, np.int32)
        positions = np.ones((len(indices), count), np.int32)
        inside = np.zeros(positions.shape, bool)
        for row, index in enumerate(indices):
          context, continuation = pairs[index]
          rows[row, :len(context) + len(continuation)] = context + continuation
          positions[row, :len(continuation)] = len(context) + np.arange(len(continuation))
          inside[row, :len(continuation)] = True
        done = 0
        for losses, predicted in self.scorer.at_positions(rows, positions, batch_size=self._rows(length)):
          part = slice(done, done + len(losses))
          done += len(losses)
          hits = (predicted == np.take_along_axis(rows[part], positions[part], axis=1)) | ~inside[part]
          sums = np.asarray(np.sum(losses, axis=1, where=inside[part], dtype=np.float64))
          for index, value, greedy in zip(indices[part], sums, hits.all(axis=1)):
            results[index] = -float(value), bool(greedy)
          bar.update(len(losses))
    return results

  def _rows(self, length: int) -> int:
    """Rows of a batch of this length."""
    if self._batch_size is not None:
      return self._batch_size
    return batch_devices(self._mesh) * max(1, self._batch_tokens // length)

  def _check_length(self, length: int, what: str) -> None:
    if self._limit is not None and length > self._limit:
      raise UserError(f"--model_args max_length={self._limit}: a request has {length} tokens of {what}, and nothing is cut off: "
                      "leave max_length out, which reads any length, or choose a task that fits")

  def _sampling(self, options: dict[str, Any]) -> Sampling:
    """The engine's sampling for the generation options of a task; an option that the engine does not have is refused."""
    for name in options:
      if name not in _GENERATION_OPTIONS:
        raise UserError(unknown_name("generation option", name, _GENERATION_OPTIONS))
    until = options.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    lengths = [options[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(name) is not None]
    values = {name: options[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
              if options.get(name) is not None}
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
      temperature = 0.0
    elif options.get("do_sample") and not temperature:
      temperature = 1.0
    most = int(lengths[0]) if lengths else self._default_new_tokens
    return Sampling(max_tokens=most, temperature=temperature, stop=stop, **values)


def _bucket(length: int, least: int, halves: bool = True) -> int:
  """Rounds a length up to a power of two or, with `halves`, to one and a half times one, so at most a third is padding."""
  whole = max(least, 1 << (length - 1).bit_length())
  return whole * 3 // 4 if halves and whole > least and length <= whole * 3 // 4 else whole


def _parse_batch_size(value: int | str) -> int | None:
  """A number of rows, or None for "auto"."""
  if isinstance(value, str) and value.startswith("auto"):
    return None
  try:
    size = int(value)
  except ValueError:
    size = 0
  if size < 1:
    raise UserError(f"--batch_size={value}: must be auto or a whole number of at least 1")
  return size

