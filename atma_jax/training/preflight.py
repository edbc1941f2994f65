"""What ``train --check`` does: looks, in seconds, for everything that would make a run fail, and trains and writes nothing.

Every check yields one line, which begins with ``ok`` or, where it cannot be told from this machine, with ``not checked``. The
first thing that is wrong ends it as it would end training: `UserError` for bad input, `RunError` for a silent server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import importlib.util
import math
import os
import pathlib
import secrets
import shutil
import socket
import threading
from typing import TypeVar

from atma_jax.checkpoints.steps import FOLDER, absolute, is_remote
from atma_jax.claims import Claims
from atma_jax.config import AT_LEAST_1, MOST_DEVICES, TOKENIZER_OF_INIT_FROM, Config
from atma_jax.data.first_look import look_at
from atma_jax.data.manifest import MANIFEST, TOKENIZER, check_settings, load_manifest, load_prepared_tokenizer, settings_of
from atma_jax.data.prepare import configured_tokenizer, parse_sources
from atma_jax.data.remote import EXTRAS, is_remote_path
from atma_jax.data.source import Source, TextSource, TokenSource
from atma_jax.data.tokenizers import Tokenizer, check_vocabulary, is_hub_name
from atma_jax.errors import RunError, UserError, described
from atma_jax.memory_needs import GIB, Needs, check_training_fits, parameter_counts, shown_bytes, state_needs
from atma_jax.ops.core.devices import DEVICES
from atma_jax.sharding import mesh_sizes
from atma_jax.training.batches import check_divides
from atma_jax.training.boards import check_project
from atma_jax.training.continued import check_start, initial_tokenizer
from atma_jax.training.workdir import data_directory

LIMIT = 60.0  # seconds that one answer may take
_EXTRAS = ("cuda", "eval", "convert", "gcs", "hf", "s3", "serve", "tpu", "transformers", "wandb")
_IMPLIED = {"tpu": ("gcs", "hf"), "gcs": ("hf",), "s3": ("hf",)}  # extras that bring what others do
_KINDS = {**{device.name: device.memory_gib for device in DEVICES}, "tpu7x": math.nan, "gpu": math.nan}
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Target:
  """Where a run is to go, if not on this machine.

  Attributes:
    kind: of the devices, a key of `ops.core.devices` or "gpu"; "" is the devices of this machine.
    devices: how many there are, all together.
    slices: TPU slices that they belong to.
    extras: of this package that are installed on the other machines; None if the run is on this machine and its files.
  """

  kind: str = ""
  devices: int = 0
  slices: int = 1
  extras: frozenset[str] | None = None

  @classmethod
  def parse(cls, devices: str | None, elsewhere: str | None) -> Target:
    """Reads the two flags of ``train``: KIND:DEVICES[:SLICES], and a list of extras. Raises `UserError` for anything else."""
    kind, count, slices = "", "0", "1"
    if devices is not None:
      kind, count, slices = [*devices.split(":"), "1"][:3] if devices.count(":") in (1, 2) else ("", "", "")
      whole = all(text.isdigit() and len(text) < 8 and AT_LEAST_1.allows(int(text)) for text in (count, slices))
      if kind not in _KINDS or not whole or int(count) > MOST_DEVICES:
        raise UserError(f"--check_for={devices}: must be KIND:DEVICES or KIND:DEVICES:SLICES, such as v6e:16, with a KIND of "
                        + ", ".join(_KINDS))
    extras = None if elsewhere is None else frozenset(filter(None, elsewhere.split(",")))
    if extras is not None and not extras <= set(_EXTRAS):
      raise UserError(f"--check_elsewhere={elsewhere}: must be extras that are installed there: {', '.join(_EXTRAS)}")
    extras = extras and extras.union(*(_IMPLIED.get(extra, ()) for extra in extras))
    return cls(kind, int(count), int(slices), extras)

  @property
  def here(self) -> bool:
    """Whether the files of this machine are those of the run."""
    return self.extras is None


def check(config: Config, workdir: str, target: Target, *, wandb: str | None = None, processes: int = 1) -> Iterator[str]:
  """Looks for what would make a run fail.

  Args:
    config: a validated recipe.
    workdir: as for `training.loop.train`.
    target: the devices and machines of the run.
    wandb: the project of Weights & Biases, if there is to be one.
    processes: of the run.

  Yields:
    A line for every check.

  Raises:
    UserError: something would make the run fail.
    RunError: a server does not answer, or not within `LIMIT` seconds.
  """
  yield f"ok           recipe {config.name}: {sum(parameter_counts(config.model).values()) / 1e6:,.1f}M parameters in matrices"
  yield from _devices(config, target, processes)
  if wandb is not None:
    _need_extra(target, "wandb", f"--wandb={wandb}", lambda: check_project(wandb))
    yield f"ok           --wandb={wandb}"
    yield "not checked  whether Weights & Biases lets this run in (wandb login, or WANDB_API_KEY)"
  directory = data_directory(config, workdir)
  yield from _workdir(config, workdir, target)
  if prepared := _prepared(config, directory, target):
    yield prepared
  else:
    yield from _data(config, directory, target, is_remote(workdir))


def _devices(config: Config, target: Target, processes: int) -> Iterator[str]:
  """Mesh, batch and memory."""
  if not target.devices and (processes > 1 or not target.here):
    yield f"not checked  mesh, batch and memory: name the devices of all {processes} processes (--check_for=KIND:DEVICES)"
    return
  if target.devices:
    gib = _KINDS[target.kind]
    memory = None if math.isnan(gib) else gib * GIB
    stated = (target.devices, memory, f"a {target.kind}")
    count, name = target.devices, f"{target.devices} of {target.kind}"
  else:
    import jax  # only now: it takes the accelerators of this machine
    stated, count, memory = None, jax.device_count(), 0.0
    name = f"{count} of this machine ({jax.devices()[0].device_kind})"
  axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.context)
  try:
    sizes = mesh_sizes(axes, count, target.slices)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error
  check_divides(config, sizes)
  rows = config.data.batch_size // config.train.accumulation // (sizes["data"] * sizes["fsdp"])
  needs: Needs = check_training_fits(config, stated)
  mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
  yield f"ok           devices: {name}; mesh {mesh}; {rows} sequences of {config.data.sequence_length} a device at a time"
  if memory is None:
    yield f"not checked  memory: a device needs at least {shown_bytes(needs.total)}; how much a {target.kind} has is not known"
  else:
    yield f"ok           memory: a device needs at least {shown_bytes(needs.total)} (what the compiler adds is not counted)"


def _prepared(config: Config, directory: pathlib.Path, target: Target) -> str:
  """What a prepared directory of this machine holds; "" if there is none."""
  if not target.here or not (directory / MANIFEST).exists():
    return ""
  manifest = load_manifest(directory)
  check_settings(manifest.settings, settings_of(config.data), directory)
  check_vocabulary(load_prepared_tokenizer(directory, manifest), config.model)
  return f"ok           data: {directory} is prepared, {sum(record['tokens'] for record in manifest.train):,} tokens"


def _data(config: Config, directory: pathlib.Path, target: Target, remote: bool) -> Iterator[str]:
  """The tokenizer, the sources, and the directory that is to hold them."""
  sources = parse_sources(config.data)
  tokenizer = None
  if config.data.tokenizer == "sentencepiece":
    if config.data.tokenizer_vocab_size > config.model.vocab_size:
      raise UserError(f"config.data.tokenizer_vocab_size={config.data.tokenizer_vocab_size}: must be at most "
                      f"config.model.vocab_size={config.model.vocab_size}")
    yield f"ok           tokenizer: trained here, {config.data.tokenizer_vocab_size:,} tokens"
  elif not target.here and (config.data.tokenizer == TOKENIZER_OF_INIT_FROM
                                or _is_path_elsewhere(config.data.tokenizer)):
    yield f"not checked  config.data.tokenizer={config.data.tokenizer}: of the other machines"
  else:
    found: Tokenizer | None = _within_limit(
      lambda: configured_tokenizer(config.data, directory / TOKENIZER, initial_tokenizer(config)),
      f"config.data.tokenizer={config.data.tokenizer!r}")
    assert found is not None, "only sentencepiece is trained"
    tokenizer = found
    check_vocabulary(tokenizer, config.model)
    yield f"ok           tokenizer: {config.data.tokenizer}, {tokenizer.vocab_size:,} tokens"
  looked: set[Source] = set()
  for source in sources:
    if source.base not in looked:
      looked.add(source.base)
      yield _source(source, tokenizer, target)
  if target.here:
    _check_writable(directory, "config.data.directory" if config.data.directory else "data: directory")
    yield f"ok           data: goes to {directory}, where {_free(directory) / 1e9:,.1f} GB are free"
  else:
    where = f"{directory} on the other machines, its room, and whether all of them see it"
    own = "on every other host a folder of its own in ~/.cache/atma_jax, and its room"
    yield f"not checked  data: {where if config.data.directory or not remote else own}"


def _source(source: TextSource | TokenSource, tokenizer: Tokenizer | None, target: Target) -> str:
  base = source.base
  extra = EXTRAS.get(base.argument.partition("://")[0], "") if is_remote_path(base.argument) else ""
  extra = "hf" if base.prefix == "hf" else extra
  if extra:
    _need_extra(target, extra, base.label, lambda: None)
  if not target.here and base.is_pattern and os.path.isabs(os.path.expanduser(base.argument)):
    return f"not checked  {base.entry}: files of the other machines"
  try:
    return f"ok           {base.entry}: {_within_limit(lambda: look_at(source, tokenizer), base.label)}"
  except UserError as error:
    if not target.here and extra and isinstance(error.__cause__, ImportError):
      return f"not checked  {base.entry}: this machine lacks the extra {extra}"
    if not target.here and base.is_pattern:
      raise UserError(f"{error}; a relative pattern is looked for in the checkout, and the other machines have no more than "
                      "that: name an absolute path, or an address") from error
    raise


def _need_extra(target: Target, extra: str, what: str, otherwise: Callable[[], object]) -> None:
  """Raises `UserError` if the other machines are installed without an extra; does `otherwise` on this one."""
  if target.extras is None:
    otherwise()
  elif extra not in target.extras:
    raise UserError(f"{what}: needs the extra {extra}, and the other machines get {', '.join(sorted(target.extras)) or 'none'} "
                    "(--extras of the launcher)")


def _is_path_elsewhere(tokenizer: str) -> bool:
  return tokenizer != "bytes" and not is_hub_name(tokenizer) and os.path.isabs(os.path.expanduser(tokenizer))


def _workdir(config: Config, workdir: str, target: Target) -> Iterator[str]:
  """The working directory: whether it can be written, has room, and is nobody's."""
  flag = f"--workdir={workdir}"
  if is_remote(workdir):
    folder = absolute(workdir)
    if not target.here and importlib.util.find_spec("gcsfs") is None:
      yield f"not checked  {flag}: this machine lacks the extra gcs"
    else:
      _within_limit(lambda: _write_and_remove(str(folder), flag), flag)
      yield f"ok           {flag}: written to and removed again, with the credentials of this machine"
    if not target.here:
      yield f"not checked  {flag}: whether the service account of the other machines may write there"
  elif not target.here:
    yield f"not checked  {flag}: a directory of the other machines, its room, and whether all of them see it"
    return
  else:
    path = pathlib.Path(workdir).absolute()
    _check_writable(path, "--workdir")
    checkpoint = state_needs(config).total
    if _free(path) < checkpoint:
      raise UserError(f"{flag}: a checkpoint takes at least {shown_bytes(checkpoint)}, and {shown_bytes(_free(path))} are free: "
                      "make room, or name another")
    owner = Claims().owner(path) if path.is_dir() else None
    if owner is not None and owner.partition(":")[0] == socket.gethostname():
      raise UserError(f"{flag}: in use by {owner} (host and process id), which is alive: wait until it has ended, or name "
                      "another directory")
    last = f"; last used by {owner}, which may still be alive" if owner is not None else ""
    goes_on = "; training goes on from its checkpoints" if any((path / FOLDER).glob("[0-9]*")) else ""
    room = f"{_free(path) / 1e9:,.1f} GB free, a checkpoint takes at least {shown_bytes(checkpoint)}"
    yield f"ok           {flag}: can be written, {room}{goes_on}{last}"
  if config.train.init_from and not target.here and not is_remote(config.train.init_from):
    yield f"not checked  config.train.init_from={config.train.init_from}: a directory of the other machines"
  elif config.train.init_from:
    _within_limit(lambda: check_start(config, workdir), "config.train.init_from")
    yield f"ok           config.train.init_from={config.train.init_from}"


def _write_and_remove(folder: str, flag: str) -> None:
  """Writes a small object to a bucket and removes it."""
  import tensorstore  # as checkpoints and claims are written
  name = f".check-{secrets.token_hex(8)}"
  try:
    store = tensorstore.KvStore.open(f"{folder.rstrip('/')}/").result()
    store.write(name, b"atma_jax\n").result()
    store.delete_range(tensorstore.KvStore.KeyRange(name, name + "\0")).result()
  except (ValueError, OSError) as error:
    if "UNAVAILABLE" in str(error) or "DEADLINE" in str(error):
      raise RunError(f"{flag}: cannot be reached: {described(error)}") from error
    raise UserError(f"{flag}: cannot be written: {described(error)}") from error


def _check_writable(path: pathlib.Path, name: str) -> None:
  """Raises `UserError` if a directory cannot be made or written; makes nothing."""
  nearest = _nearest(path)
  if not nearest.is_dir():
    raise UserError(f"{name}={path}: cannot be written: {nearest} is a file, not a directory")
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise UserError(f"{name}={path}: cannot be written: no permission to write to {nearest}")
  if os.statvfs(nearest).f_flag & os.ST_RDONLY:
    raise UserError(f"{name}={path}: cannot be written: {nearest} is on a file system that is mounted read-only")


def _nearest(path: pathlib.Path) -> pathlib.Path:
  """The path itself, or the nearest directory above it that exists."""
  return next(parent for parent in (path, *path.parents) if parent.exists() or parent.is_symlink())


def _free(path: pathlib.Path) -> int:
  return shutil.disk_usage(_nearest(path)).free


def _within_limit(call: Callable[[], _T], what: str) -> _T:
  """The result of a call that may wait for a server or a slow disk. Raises `RunError` if it takes more than `LIMIT` seconds."""
  results: list[_T] = []
  errors: list[BaseException] = []

  def work() -> None:
    try:
      results.append(call())
    except BaseException as error:
      errors.append(error)

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  thread.join(LIMIT)
  if errors:
    raise errors[0]
  if not results:
    raise RunError(f"{what}: no answer within {LIMIT:.0f} s")
  return results[0]
