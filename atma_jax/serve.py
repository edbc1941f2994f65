"""Serves a checkpoint, from its directory alone, with the OpenAI completions and chat protocols.

    python -m atma_jax.serve --checkpoint=DIR [--port=8000 --rows=8 --capacity=4096 --cache_gib=8 --cache_dtype=int8]
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def main(", "max_tokens": 64, "stream": true}'

Paths: /v1/completions, /v1/chat/completions (of a checkpoint that was trained on conversations), /v1/models, /health, /metrics
(Prometheus). After SIGTERM it ends what it has begun and exits with 0.
"""

from __future__ import annotations

from absl import flags, logging

from atma_jax import cli, compilation_cache
from atma_jax.checkpoints.load import load_model
from atma_jax.dataclass_flags import DataclassFlags
from atma_jax.errors import UserError
from atma_jax.inference.api import fitting_engine
from atma_jax.inference.footprint import sizes_within
from atma_jax.models.cache import CACHE_DTYPES
from atma_jax.serving.access import Access, warn_of_strangers
from atma_jax.serving.limits import MOST, Limits
from atma_jax.sharding import make_mesh

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, its checkpoints folder, or hf:USER/NAME.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default is the newest good one.")
_EMA = flags.DEFINE_boolean("ema", False, "Use the moving average of the weights (config.train.ema_decay).")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is all of them.")
_PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one, which the log names.", lower_bound=0, upper_bound=65535)
_MODEL_NAME = flags.DEFINE_string("model_name", None, "Name that clients ask for; default is the recipe's.")
_CAPACITY = flags.DEFINE_integer("capacity", 2048, "Most tokens of a prompt and its text.", lower_bound=2, upper_bound=MOST)
_ROWS = flags.DEFINE_integer("rows", 8, "Sequences decoded at once, split over the devices.", lower_bound=1, upper_bound=MOST)
_CACHE_GIB = flags.DEFINE_float("cache_gib", None, "Memory of a device for caches, in GiB; it replaces --rows, but see --page.")
_PAGE = flags.DEFINE_integer("page", None, "Tokens of a page, 8 to 256; --rows share as many as --cache_gib holds.")
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, CACHE_DTYPES, "Type of keys and values; default is the model's.")
_CHUNK = flags.DEFINE_integer("chunk", 512, "Most prompt tokens in one forward pass, a power of two.", upper_bound=MOST)
_FIRST_CHUNK = flags.DEFINE_integer("first_chunk", None, "The same for its first pass; default is --chunk.", upper_bound=MOST)
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", 8, "Tokens decoded at once.", lower_bound=1, upper_bound=MOST)
flags.DEFINE_alias("stride", "decode_steps")  # its earlier name
_PREFIXES = flags.DEFINE_integer("prefixes", 4, "Prompts whose states are kept for later ones.", lower_bound=0, upper_bound=MOST)
_LOGPROBS = flags.DEFINE_integer("max_logprobs", 5, "Most likeliest tokens that a request may ask for.", lower_bound=0)
_PROMPT_LOGPROBS = flags.DEFINE_boolean("prompt_logprobs", True, "Serve echo with logprobs, for which prompts are scored.")
_OVERRIDES = cli.define_override_flags()
_CACHE = flags.DEFINE_string("compilation_cache", "auto", compilation_cache.HELP)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share a copy of the model; the others split the rows.", lower_bound=1)
_LIMITS, _ACCESS = DataclassFlags(Limits), DataclassFlags(Access)


def main() -> int:
  """Serves until SIGTERM has drained it. Raises `UserError` on bad flags, bad checkpoints and an address that is taken."""
  if not _CHECKPOINT.value:
    raise UserError("--checkpoint=DIR is required")
  limits, access = _LIMITS.value, _ACCESS.value
  try:
    from atma_jax.serving.http import CompletionServer, listen
    mesh = make_mesh(tensor=_TENSOR.value)
  except ImportError as error:
    raise UserError(f"{error}; the server needs more packages: pip install 'atma_jax[serve]'") from error
  except ValueError as error:
    raise UserError(f"--tensor={_TENSOR.value}: {error}") from error
  listener = listen(_HOST.value, _PORT.value)
  warn_of_strangers(listener.getsockname()[0], access)
  compilation_cache.use_compilation_cache(_CACHE.value)
  config, model, tokenizer, step = load_model(_CHECKPOINT.value, _STEP.value, mesh, ema=_EMA.value, overrides=_OVERRIDES.values())
  options = {"capacity": _CAPACITY.value, "prefixes": _PREFIXES.value, "cache_dtype": _CACHE_DTYPE.value}
  sizes = sizes_within(config.model, _CACHE_GIB.value, rows=_ROWS.value, page=_PAGE.value, shards=mesh.shape["data"], **options)
  given = {"alternatives": f"max_logprobs={_LOGPROBS.value}"}
  given |= {} if _CACHE_GIB.value is None else dict.fromkeys(("capacity", "rows"), f"cache_gib={_CACHE_GIB.value}")
  engine = fitting_engine(model, tokenizer, given, **sizes, chunk=_CHUNK.value, first_chunk=_FIRST_CHUNK.value, **options,
                          decode_steps=_DECODE_STEPS.value, alternatives=_LOGPROBS.value, prompt_logprobs=_PROMPT_LOGPROBS.value,
                          saved_states=False)
  del model
  logging.info("step %d, %d rows of %d tokens; compiling", step, engine.rows, _CAPACITY.value)
  engine.warm_up()
  return CompletionServer(engine, _MODEL_NAME.value or config.name, limits, access).run(listener)


if __name__ == "__main__":
  cli.run(main)
