"""What a compiled program moves, read from its optimised HLO text with loops counted as often as they run.

XLA's own `cost_analysis` counts the body of a loop once. Here every instruction is weighted with the product of the trip
counts around it. Two sums come out: bytes through device memory (operands read and results written by the instructions
that are not fused into others; buffers that the TPU compiler placed in on-chip memory are left out) and the collectives.
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
_ARRAY = re.compile(r"\b(%s)\[([\d,]*)\](\{[^}]*\})?" % "|".join(_BYTES))
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations)=\{?([^,}]+(?:, %[\w.\-]+)*)\}?")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These move nothing by themselves: names for parts of other buffers, or control flow whose bodies are counted.
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
                   "after-all", "copy-done", "partition-id", "replica-id", "iota", "optimization-barrier"))
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device moves in one run of a program.

  `collectives` maps a kind to how often it runs and the bytes of its results; `unknown_loops` counts loops whose trip
  count is not a constant of their condition: their bodies are counted once.
  """

  memory_bytes: float
  collectives: dict[str, tuple[int, float]]
  unknown_loops: int


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
  memory = 0.0
  seen = set()
  for name, count in runs.items():
    sizes = {i.name: i.result for i in computations[name]}
    for instruction in computations[name]:
      memory += count * _moved(instruction, sizes, computations)
      for part in _inside(instruction, computations):
        kind = next((k for k in _COLLECTIVES if part.kind in (k, f"{k}-start")), None)
        channel = re.search(r"channel_id=(\d+)", part.rest)
        key = (name, channel[1] if channel else part.name)
        if kind and key not in seen:  # a start and its end repeat the channel
          seen.add(key)
          times, moved = collectives.get(kind, (0, 0.0))
          collectives[kind] = times + count, moved + count * max(_arrays(part.result), default=0)
  return Traffic(memory, collectives, unknown)


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


def _inside(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> list[_Instruction]:
  """The instruction itself, or those fused into it."""
  fused = [name for attribute in ("calls",) for name in instruction.called(attribute)]
  return [instruction, *(part for name in fused for part in computations.get(name, ()))]


def _moved(instruction: _Instruction, sizes: dict[str, str], computations: dict[str, list[_Instruction]]) -> float:
  """Bytes of device memory an instruction reads and writes; of what it only slices or updates, the slice."""
  if instruction.kind in _FREE or instruction.kind.endswith("-done"):
    return 0
  read = [sum(_arrays(sizes[name], on_chip=False)) for name in instruction.operands if name in sizes]
  written = sum(_arrays(instruction.result, on_chip=False))
  if instruction.kind in _SLICES:
    return 2 * written
  if instruction.kind == "dynamic-update-slice":
    return 2 * read[1] if len(read) > 1 else 0
  if instruction.kind == "fusion":
    body = computations.get(instruction.called("calls")[0], [])
    parameters = {i.name: int(re.match(r"(\d+)\)", i.rest)[1]) for i in body if i.kind == "parameter"}
    users = collections.defaultdict(list)
    for part in body:
      for operand in part.operands:
        users[operand].append(part)
    for name, index in parameters.items():
      if users[name] and all(part.kind in _SLICES for part in users[name]) and index < len(read):
        read[index] = min(read[index], sum(sum(_arrays(part.result)) for part in users[name]))
      if any(part.kind == "dynamic-update-slice" and part.operands[0] == name for part in users[name]):
        updates = [i.result for part in users[name] for i in body if part.operands[1:2] == [i.name]]
        update = sum(sum(_arrays(result)) for result in updates)
        written = min(written, update) if any(part.root for part in users[name]) else written
        read[index] = 0
  return sum(read) + written


def _arrays(result: str, on_chip: bool = True) -> list[int]:
  """Bytes of each array of a result type; without those in on-chip memory (layout ``S(1)`` and so on) if asked."""
  return [_BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape, layout in _ARRAY.findall(result)
          if on_chip or not re.search(r"S\([1-9]", layout or "")]
