"""What a compiled program does, read from its optimised HLO text, with loops counted as often as they run.

XLA's own `cost_analysis` counts the body of a loop once. Here every instruction is weighted by the product of the trip counts
around it. Three sums come out: the operations of matrix products (and those that kernels state), the bytes through device memory
(operands and results of the instructions that are not fused into others, without buffers that the TPU compiler placed in on-chip
memory), and the collectives.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import dataclasses
import math
import re

PASSES = {"all-reduce": 2}  # over the buffer, in a ring: reduce-scatter, then all-gather
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8, "c64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations)=\{?([^,}]+(?:, %[\w.\-]+)*)\}?")
_LABELS = re.compile(r"dim_labels=([\w]+)_([\w]+)->([\w]+)")
# These move nothing themselves: they rename parts of other buffers, or control flow whose bodies are counted.
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
                   "after-all", "copy-done", "partition-id", "replica-id", "iota", "optimization-barrier"))
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device does in one run of a program.

  Attributes:
    flops: operations of matrix products and kernels; a multiply-add is two.
    memory_bytes: bytes read from and written to device memory.
    collectives: for every kind, how often it runs and the bytes that pass through a device: the whole buffer (the result of an
      all-gather, the operand of a reduce-scatter), twice for an all-reduce.
    network_bytes: bytes that a device sends to other slices, if the compiler has already split a collective into one within a
      slice and one between slices.
    unknown_loops: loops whose trip count is no constant; their bodies are counted once.
    kernels: how often Pallas kernels run.
  """

  flops: float
  memory_bytes: float
  collectives: dict[str, tuple[int, float]]
  network_bytes: float
  unknown_loops: int
  kernels: int


@dataclasses.dataclass
class _Instruction:
  """One line of a computation: ``ROOT? %name = result kind(operands), rest``."""

  name: str
  kind: str
  result: str
  operands: list[str]
  rest: str
  root: bool

  def called(self, attribute: str) -> list[str]:
    """Names of the computations that it calls as `attribute`, such as ``body`` or ``calls``."""
    return [name.strip().lstrip("%") for key, names in _CALLED.findall(self.rest) if key == attribute
            for name in names.split(",")]


_Computation = list[_Instruction]
_Module = dict[str, _Computation]


def traffic(text: str) -> Traffic:
  """Sums over the text of a compiled module (``compiled.as_text()``)."""
  module, entry = _parse(text)
  runs, unknown = _count_runs(module, entry)
  collectives: dict[str, tuple[int, float]] = {}
  chains: dict[str, tuple[int, str, float]] = {}
  flops = memory = network = 0.0
  kernels = 0

  def add(kind: str, count: int, moved: float) -> None:
    times, before = collectives.get(kind, (0, 0.0))
    collectives[kind] = times + count, before + count * moved

  for name, count in runs.items():
    shapes = _results(module[name])
    channels = set()  # a fused asynchronous collective is spread over several fusions with one channel in common,
    for instruction in module[name]:
      memory += count * _moved(instruction, shapes, module)
      for part, inner in _with_fused(instruction, shapes, module):
        flops += count * _flops(part, inner)
        kernels += count * ('custom_call_target="tpu_custom_call"' in part.rest)
        kind = next((k for k in _COLLECTIVES if part.kind in (k, f"{k}-start")), None)
        chain, channel = (re.search(pattern, part.rest) for pattern in (r'chain_id="(\d+)"', r"channel_id=(\d+)"))
        if kind and part is not instruction and chain:  # or over those of one chain, some in loops that it overlaps with
          one = count, kind, PASSES.get(kind, 1) * _buffer(part, inner)
          chains[chain[1]] = min(one, chains.get(chain[1], one))
        elif kind and (part is instruction or channel is None or channel[1] not in channels):
          if part is not instruction and channel:
            channels.add(channel[1])
          add(kind, count, PASSES.get(kind, 1) * _buffer(part, inner))
        if part.kind == "send" and "megascale" in part.rest:
          network += count * sum(_array_bytes(inner[part.operands[0]]))
  for count, kind, moved in chains.values():
    add(kind, count, moved)
  return Traffic(flops, memory, collectives, network, unknown, kernels)


def _parse(text: str) -> tuple[_Module, str]:
  """The computations of a module by name, and the name of the entry."""
  module: _Module = {}
  entry, current = "", None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = module.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif (found := _INSTRUCTION.match(line)) and current is not None:
      root, name, result, kind, rest = found.groups()
      arguments = rest.split("), ")[0]
      current.append(_Instruction(name, kind, result, re.findall(r"%([\w.\-]+)", arguments), rest, bool(root)))
  return module, entry


def _results(computation: _Computation) -> dict[str, str]:
  """The result type of every instruction by name."""
  return {instruction.name: instruction.result for instruction in computation}


def _root(computation: _Computation) -> _Instruction:
  return next(instruction for instruction in computation if instruction.root)


def _named(computation: _Computation, name: str) -> _Instruction:
  return next(instruction for instruction in computation if instruction.name == name)


def _count_runs(module: _Module, entry: str) -> tuple[collections.Counter[str], int]:
  """How often every computation that is not fused runs, and the number of loops with an unknown trip count."""
  runs, unknown = collections.Counter({entry: 1}), 0
  pending = [(entry, 1)]
  while pending:
    name, count = pending.pop()
    for instruction in module[name]:
      inner, times = [], 1
      if instruction.kind == "while":
        trips = _trip_count(module[instruction.called("condition")[0]])
        unknown += trips is None
        times = trips or 1
        inner = instruction.called("body")
      elif instruction.kind in ("call", "conditional"):
        inner = instruction.called("to_apply") + instruction.called("branch_computations")
      for called in inner:
        runs[called] += count * times
        pending.append((called, count * times))
  return runs, unknown


def _trip_count(condition: _Computation) -> int | None:
  """The bound that a loop's condition compares a counter from zero with; None if it is no constant."""
  constants = {i.name: re.match(r"(-?\d+)\)", i.rest) for i in condition if i.kind == "constant"}
  for instruction in condition:
    if instruction.root and instruction.kind == "compare" and "direction=LT" in instruction.rest:
      bounds = [found for found in map(constants.get, instruction.operands) if found]
      return int(bounds[0][1]) if bounds else None
  return None


def _with_fused(instruction: _Instruction, shapes: dict[str, str],
                module: _Module) -> Iterator[tuple[_Instruction, dict[str, str]]]:
  """The instruction and those fused into it, at any depth, each with the result types of its computation."""
  yield instruction, shapes
  for name in instruction.called("calls"):
    body = module.get(name, [])
    inner = _results(body)
    for part in body:
      yield from _with_fused(part, inner, module)


def _buffer(collective: _Instruction, shapes: dict[str, str]) -> int:
  """Bytes of the whole buffer of a collective: the larger of its operands and its results."""
  taken = sum(sum(_array_bytes(shapes[name])) for name in collective.operands if name in shapes)
  made = _array_bytes(collective.result)
  if collective.kind.endswith("-start"):  # its result repeats its operands, and may carry counters
    return max(taken, max(made, default=0))
  return max(taken, sum(made))


def _flops(instruction: _Instruction, shapes: dict[str, str]) -> float:
  """Operations of a matrix product, which the TPU compiler writes as a convolution, or of a kernel that states them."""
  if instruction.kind == "custom-call":
    stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.rest)
    return float(stated[1]) if stated else 0.0
  if instruction.kind == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    assert contracted is not None, instruction.rest
    lhs = _shape(shapes[instruction.operands[0]])
    return 2.0 * math.prod(_shape(instruction.result)) * math.prod(lhs[int(i)] for i in contracted[1].split(",") if i)
  labels = _LABELS.search(instruction.rest)
  if instruction.kind != "convolution" or labels is None:
    return 0.0
  lhs, kernel = (_shape(shapes[name]) for name in instruction.operands[:2])
  out = _shape(instruction.result)
  total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
  for axis, label in enumerate(sorted(filter(str.isdigit, labels[3]))):
    def window(name: str, default: str, axis: int = axis) -> str:
      found = re.search(rf"window=\{{[^}}]*\b{name}=([\w\-]+)", instruction.rest)
      return found[1].split("x")[axis] if found else default
    total *= _products(lhs[labels[1].index(label)], out[labels[3].index(label)], int(window("size", "1")),
                       int(window("stride", "1")), int(window("pad", "0_0").split("_")[0]),
                       int(window("lhs_dilate", "1")), int(window("rhs_dilate", "1")))
  return total


def _products(size: int, out: int, taps: int, stride: int, low: int, dilate: int, tap_dilate: int) -> int:
  """Products along one axis of a convolution: pairs of an output position and a tap that meet an element of the input.

  Padding and the holes of a dilated input do not count.

  Args:
    size: elements of the input.
    out: elements of the output.
    taps: taps of the kernel.
    stride: input positions between two output positions.
    low: padding before the input.
    dilate: positions between two elements of the input.
    tap_dilate: positions between two taps.
  """
  if out * taps > 1 << 22:
    return out * taps
  positions = (o * stride + t * tap_dilate - low for o in range(out) for t in range(taps))
  return sum(p % dilate == 0 and 0 <= p // dilate < size for p in positions)


def _shape(result: str) -> list[int]:
  """Dimensions of a result type that is a single array."""
  array = _ARRAY.search(result)
  assert array is not None, result
  return [int(n) for n in array[2].split(",") if n]


def _moved(instruction: _Instruction, shapes: dict[str, str], module: _Module) -> float:
  """Bytes of device memory that an instruction reads and writes; of an array that it slices or updates, only the slice."""
  if instruction.kind in _FREE or instruction.kind.endswith("-done") or 'target="AllocateBuffer"' in instruction.rest:
    return 0
  operands = [sum(_array_bytes(shapes[name], on_chip=False)) for name in instruction.operands if name in shapes]
  written = _array_bytes(instruction.result, on_chip=False)
  if instruction.kind in _SLICES:
    return min(operands[0], sum(_array_bytes(instruction.result))) + sum(written)
  if instruction.kind == "dynamic-update-slice":
    return operands[1] + sum(_array_bytes(shapes[instruction.operands[1]])) if written else 0
  called = instruction.called("calls")
  if instruction.kind == "async-start":  # a slice or copy that runs beside other instructions
    inner = module[called[0]]
    return sum(_moved(part, _results(inner), module) for part in inner)
  if instruction.kind.endswith("-start"):  # its result repeats its operands
    return sum(operands) + max(0, sum(written) - sum(operands))
  if instruction.kind != "fusion":
    return sum(operands) + sum(written)
  body = module[called[0]]
  reads = sum(min(size, _read(body, name, size, module)) for size, name in zip(operands, _parameters(body)) if size)
  return reads + sum(_written(body, _root(body), _ARRAY.findall(instruction.result), module))


def _parameters(body: _Computation) -> list[str]:
  """Names of the parameters of a computation, in order."""
  numbers = {i.name: re.match(r"(\d+)\)", i.rest) for i in body if i.kind == "parameter"}
  return sorted(numbers, key=lambda name: int(found[1]) if (found := numbers[name]) else 0)


def _read(body: _Computation, name: str, size: float, module: _Module) -> float:
  """Bytes that a fused computation reads of its value `name` of `size` bytes.

  Of a value that it slices, only the slice; of a value that it updates in place, nothing.
  """
  total = 0.0
  for part in body:
    for position, operand in enumerate(part.operands):
      if operand != name:
        continue
      if part.kind == "bitcast":
        total += size if part.root else _read(body, part.name, size, module)
      elif part.kind in _SLICES and position == 0:
        total += sum(_array_bytes(part.result))
      elif part.kind == "fusion":
        inner = module[part.called("calls")[0]]
        total += _read(inner, _parameters(inner)[position], size, module)
      elif not (part.kind == "dynamic-update-slice" and position == 0):
        return size
  return total


def _written(body: _Computation, root: _Instruction, results: list[tuple[str, str, str]], module: _Module) -> list[float]:
  """Bytes that a fused computation writes to each of its results, which are given as `_ARRAY` finds them.

  Of a result that it updates in place, only the slice.
  """
  if root.kind == "tuple":
    made = [_named(body, name) for name in root.operands]
    return [size for part, result in zip(made, results) for size in _written(body, part, [result], module)]
  if root.kind == "bitcast":
    return _written(body, _named(body, root.operands[0]), results, module)
  if root.kind == "fusion":
    inner = module[root.called("calls")[0]]
    return _written(inner, _root(inner), results, module)
  sizes: list[float] = [0 if _is_on_chip(layout) else _size(dtype, shape) for dtype, shape, layout in results]
  if root.kind == "dynamic-update-slice":
    update = _named(body, root.operands[1])
    return [min(size, sum(_array_bytes(update.result))) for size in sizes]
  return sizes


def _array_bytes(result: str, on_chip: bool = True) -> list[int]:
  """Bytes of each array of a result type; without the arrays in on-chip memory if `on_chip` is False."""
  return [_size(dtype, shape) for dtype, shape, layout in _ARRAY.findall(result) if on_chip or not _is_on_chip(layout)]


def _is_on_chip(layout: str) -> bool:
  """Whether the memory space of a layout, ``S(1)`` and so on, is not the device memory."""
  return re.search(r"S\([1-9]", layout or "") is not None


def _size(dtype: str, shape: str) -> int:
  return _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
