"""What a compiled program does, read from its optimised HLO text with loops counted as often as they run.

XLA's own `cost_analysis` counts the body of a loop once. Here every instruction is weighted with the product of the trip
counts around it. Three sums come out: operations of matrix products (and what kernels say of themselves), bytes through
device memory (operands read and results written by the instructions that are not fused into others; buffers that the
TPU compiler placed in on-chip memory are left out) and the collectives.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8, "c64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations)=\{?([^,}]+(?:, %[\w.\-]+)*)\}?")
_LABELS = re.compile(r"dim_labels=([\w]+)_([\w]+)->([\w]+)")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PASSES = {"all-reduce": 2}  # over its buffer, for a ring: reduce-scatter, then all-gather
# These move nothing by themselves: names for parts of other buffers, or control flow whose bodies are counted.
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
                   "after-all", "copy-done", "partition-id", "replica-id", "iota", "optimization-barrier"))
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device does in one run of a program.

  `collectives` maps a kind to how often it runs and the bytes that pass through a device: the whole buffer (what an
  all-gather makes, what a reduce-scatter takes), twice for an all-reduce; `network_bytes` are those a device sends to other
  slices, where the compiler has already cut a collective in one within a slice and one between them; `unknown_loops` counts
  loops whose trip count is not a constant: their bodies are counted once. `kernels` is how often Pallas kernels run.
  """

  flops: float
  memory_bytes: float
  collectives: dict[str, tuple[int, float]]
  network_bytes: float
  unknown_loops: int
  kernels: int


@dataclasses.dataclass
class _Instruction:
  name: str
  kind: str
  result: str
  operands: list[str]
  rest: str
  root: bool

  def called(self, attribute: str) -> list[str]:
    return [name.strip().lstrip("%") for key, names in _CALLED.findall(self.rest) if key == attribute
            for name in names.split(",")]


def traffic(text: str) -> Traffic:
  """Sums over the text of a compiled module (``compiled.as_text()``)."""
  computations, entry = _parse(text)
  runs, unknown = _runs(computations, entry)
  collectives: dict[str, tuple[int, float]] = {}
  chains: dict[str, tuple[int, str, float]] = {}
  flops = memory = network = 0.0
  kernels = 0

  def add(kind: str, count: int, moved: float) -> None:
    times, before = collectives.get(kind, (0, 0.0))
    collectives[kind] = times + count, before + count * moved

  for name, count in runs.items():
    sizes = {i.name: i.result for i in computations[name]}
    channels = set()  # fused, an asynchronous collective is spread over several fusions of one channel,
    for instruction in computations[name]:
      memory += count * _moved(instruction, sizes, computations)
      for part, shapes in _inside(instruction, sizes, computations):
        flops += count * _flops(part, shapes)
        kernels += count * ('custom_call_target="tpu_custom_call"' in part.rest)
        kind = next((k for k in _COLLECTIVES if part.kind in (k, f"{k}-start")), None)
        chain, channel = (re.search(pattern, part.rest) for pattern in (r'chain_id="(\d+)"', r"channel_id=(\d+)"))
        if kind and part is not instruction and chain:  # or over those of one chain, some of them in loops it overlaps with
          one = count, kind, PASSES.get(kind, 1) * _buffer(part, shapes)
          chains[chain[1]] = min(one, chains.get(chain[1], one))
        elif kind and (part is instruction or channel is None or channel[1] not in channels):
          if part is not instruction and channel:
            channels.add(channel[1])
          add(kind, count, PASSES.get(kind, 1) * _buffer(part, shapes))
        if part.kind == "send" and "megascale" in part.rest:
          network += count * sum(_arrays(shapes[part.operands[0]]))
  for count, kind, moved in chains.values():
    add(kind, count, moved)
  return Traffic(flops, memory, collectives, network, unknown, kernels)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif (found := _INSTRUCTION.match(line)) and current is not None:
      root, name, result, kind, rest = found.groups()
      arguments = rest.split("), ")[0]
      current.append(_Instruction(name, kind, result, re.findall(r"%([\w.\-]+)", arguments), rest, bool(root)))
  return computations, entry


def _runs(computations: dict[str, list[_Instruction]], entry: str) -> tuple[collections.Counter[str], int]:
  """How often each computation that is not fused runs, and the number of loops with an unknown trip count."""
  runs, unknown = collections.Counter({entry: 1}), 0
  pending = [(entry, 1)]
  while pending:
    name, count = pending.pop()
    for instruction in computations[name]:
      inner, times = [], 1
      if instruction.kind == "while":
        times = _trips(computations[instruction.called("condition")[0]])
        unknown += times is None
        times = times or 1
        inner = instruction.called("body")
      elif instruction.kind in ("call", "conditional"):
        inner = instruction.called("to_apply") + instruction.called("branch_computations")
      for called in inner:
        runs[called] += count * times
        pending.append((called, count * times))
  return runs, unknown


def _trips(condition: list[_Instruction]) -> int | None:
  """The bound that a counter from zero is compared with."""
  constants = {i.name: re.match(r"(-?\d+)\)", i.rest) for i in condition if i.kind == "constant"}
  for instruction in condition:
    if instruction.root and instruction.kind == "compare" and "direction=LT" in instruction.rest:
      bounds = [constants[name] for name in instruction.operands if constants.get(name)]
      return int(bounds[0][1]) if bounds else None
  return None


def _inside(instruction: _Instruction, sizes: dict[str, str],
            computations: dict[str, list[_Instruction]]) -> list[tuple[_Instruction, dict[str, str]]]:
  """The instruction itself, and those fused into it, at any depth; each with the result types of its computation."""
  parts = [(instruction, sizes)]
  for name in instruction.called("calls"):
    body = computations.get(name, [])
    shapes = {i.name: i.result for i in body}
    for part in body:
      parts += _inside(part, shapes, computations)
  return parts


def _buffer(collective: _Instruction, sizes: dict[str, str]) -> int:
  """Bytes of a collective's whole buffer: the larger of what it takes and what it makes."""
  taken = sum(sum(_arrays(sizes[name])) for name in collective.operands if name in sizes)
  made = _arrays(collective.result)
  if collective.kind.endswith("-start"):  # its result repeats its operands, and may carry counters
    return max(taken, max(made, default=0))
  return max(taken, sum(made))


def _flops(instruction: _Instruction, sizes: dict[str, str]) -> float:
  """Operations of a matrix product, which the TPU compiler writes as a convolution, or of a kernel that states them."""
  if instruction.kind == "custom-call":
    stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.rest)
    return float(stated[1]) if stated else 0.0
  if instruction.kind == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    lhs = _shape(sizes[instruction.operands[0]])
    return 2.0 * math.prod(_shape(instruction.result)) * math.prod(lhs[int(i)] for i in contracted[1].split(",") if i)
  labels = _LABELS.search(instruction.rest)
  if instruction.kind != "convolution" or labels is None:
    return 0.0
  lhs, kernel = (_shape(sizes[name]) for name in instruction.operands[:2])
  out = _shape(instruction.result)
  total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
  for axis, label in enumerate(sorted(filter(str.isdigit, labels[3]))):
    def window(name: str, default: str, axis: int = axis) -> str:
      found = re.search(rf"window=\{{[^}}]*\b{name}=([\w\-]+)", instruction.rest)
      return found[1].split("x")[axis] if found else default
    total *= _meetings(lhs[labels[1].index(label)], out[labels[3].index(label)], int(window("size", "1")),
                       int(window("stride", "1")), int(window("pad", "0_0").split("_")[0]),
                       int(window("lhs_dilate", "1")), int(window("rhs_dilate", "1")))
  return total


def _meetings(size: int, out: int, taps: int, stride: int, low: int, dilate: int, tap_dilate: int) -> int:
  """Pairs of an output position and a tap that meet an element of the input rather than padding or a dilation's hole."""
  if out * taps > 1 << 22:
    return out * taps
  positions = (o * stride + t * tap_dilate - low for o in range(out) for t in range(taps))
  return sum(p % dilate == 0 and 0 <= p // dilate < size for p in positions)


def _shape(result: str) -> list[int]:
  """Dimensions of a result type that is one array."""
  return [int(n) for n in _ARRAY.search(result)[2].split(",") if n]


def _moved(instruction: _Instruction, sizes: dict[str, str], computations: dict[str, list[_Instruction]]) -> float:
  """Bytes of device memory an instruction reads and writes; of what it only slices or updates, the slice."""
  if instruction.kind in _FREE or instruction.kind.endswith("-done") or 'target="AllocateBuffer"' in instruction.rest:
    return 0
  operands = [sum(_arrays(sizes[name], on_chip=False)) for name in instruction.operands if name in sizes]
  written = _arrays(instruction.result, on_chip=False)
  if instruction.kind in _SLICES:
    return min(operands[0], sum(_arrays(instruction.result))) + sum(written)
  if instruction.kind == "dynamic-update-slice":
    return operands[1] + sum(_arrays(sizes[instruction.operands[1]])) if written else 0
  called = instruction.called("calls")
  if instruction.kind == "async-start":  # a slice or copy that runs beside other instructions
    inner = computations[called[0]]
    return sum(_moved(part, {i.name: i.result for i in inner}, computations) for part in inner)
  if instruction.kind.endswith("-start"):  # its result repeats its operands
    return sum(operands) + max(0, sum(written) - sum(operands))
  if instruction.kind != "fusion":
    return sum(operands) + sum(written)
  body = computations[called[0]]
  reads = sum(min(size, _read(body, name, size, computations)) for size, name in zip(operands, _parameters(body)) if size)
  return reads + sum(_written(body, next(i for i in body if i.root), _ARRAY.findall(instruction.result), computations))


def _parameters(body: list[_Instruction]) -> list[str]:
  """Names of a computation's parameters, in order."""
  found = {int(re.match(r"(\d+)\)", i.rest)[1]): i.name for i in body if i.kind == "parameter"}
  return [found[index] for index in sorted(found)]


def _read(body: list[_Instruction], name: str, size: float, computations: dict[str, list[_Instruction]]) -> float:
  """Bytes that a fused computation reads of a value of `size` bytes: what it slices, nothing of what it updates in place."""
  total = 0.0
  for part in body:
    for position, operand in enumerate(part.operands):
      if operand != name:
        continue
      if part.kind == "bitcast":
        total += size if part.root else _read(body, part.name, size, computations)
      elif part.kind in _SLICES and position == 0:
        total += sum(_arrays(part.result))
      elif part.kind == "fusion":
        inner = computations[part.called("calls")[0]]
        total += _read(inner, _parameters(inner)[position], size, computations)
      elif not (part.kind == "dynamic-update-slice" and position == 0):
        return size
  return total


def _written(body: list[_Instruction], root: _Instruction, results: list[tuple[str, str, str]],
             computations: dict[str, list[_Instruction]]) -> list[float]:
  """Bytes that a fused computation writes to each of its results, given as `_ARRAY` finds them; of an update, its slice."""
  if root.kind == "tuple":
    made = [next(i for i in body if i.name == name) for name in root.operands]
    return [size for part, result in zip(made, results) for size in _written(body, part, [result], computations)]
  if root.kind == "bitcast":
    return _written(body, next(i for i in body if i.name == root.operands[0]), results, computations)
  if root.kind == "fusion":
    inner = computations[root.called("calls")[0]]
    return _written(inner, next(i for i in inner if i.root), results, computations)
  sizes = [0 if re.search(r"S\([1-9]", layout or "") else _size(dtype, shape) for dtype, shape, layout in results]
  if root.kind == "dynamic-update-slice":
    update = next(i for i in body if i.name == root.operands[1])
    return [min(size, sum(_arrays(update.result))) for size in sizes]
  return sizes


def _arrays(result: str, on_chip: bool = True) -> list[int]:
  """Bytes of each array of a result type; without those in on-chip memory (layout ``S(1)`` and so on) if asked."""
  return [_size(dtype, shape) for dtype, shape, layout in _ARRAY.findall(result)
          if on_chip or not re.search(r"S\([1-9]", layout or "")]


def _size(dtype: str, shape: str) -> int:
  return _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
