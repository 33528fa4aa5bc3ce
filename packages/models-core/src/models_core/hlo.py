"""What a compiled program does with its arguments and between devices, read from its text.

The text is that of `jax.jit(...).lower(...).compile().as_text()`, for one device of a mesh.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

# Instructions that send data between devices; those that only start to send are named the same, with "-start" behind.
COLLECTIVES = frozenset(
  {"all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter"}
)

# Instructions whose result is an operand of theirs, without work.
_ALIASES = frozenset({"bitcast", "opt-barrier"})

# Instructions whose result is no changed copy of an operand, even if it has as many elements.
_NEW = frozenset(
  {"convolution", "custom-call", "dot", "dynamic-slice", "gather", "reduce", "reduce-window", "scatter"}
)

# Arguments that a value consists of: names, or for a tuple, a list of such values.
_Value = Any


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
  """One line of a compiled program.

  Attributes:
    name: of the result.
    opcode: what it does, such as "fusion".
    sizes: numbers of elements of the results.
    operands: names of the operands.
    line: the text of the line.
  """

  name: str
  opcode: str
  sizes: tuple[int, ...]
  operands: tuple[str, ...]
  line: str

  @property
  def size(self) -> int:
    """Number of elements of the largest result."""
    return max(self.sizes, default=0)


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
  """An instruction that writes or sends something.

  Attributes:
    instruction: which one.
    arguments: names of the program's arguments that it takes, as they are or copied.
  """

  instruction: Instruction
  arguments: frozenset[str]


class Program:
  """A compiled program.

  Attributes:
    arguments: names of the program's arguments.
    copies: instructions that write all elements of an argument of the program anew: copies, transposes, casts, and
      operations on each element. The products and sums into which they are fused do not count.
    collectives: instructions that send something between devices.
  """

  arguments: frozenset[str]
  copies: list[Use]
  collectives: list[Use]

  def __init__(self, text: str):
    self.copies, self.collectives = [], []
    self._computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
      if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
        current = head[2]
        self._computations[current] = []
        entry = current if head[1] else entry
      elif current and (instruction := _parse(line)) is not None:
        self._computations[current].append(instruction)
    names = [_argument(line) for line in self._computations[entry] if line.opcode == "parameter"]
    self.arguments = frozenset().union(*names)
    self._follow(entry, None)

  def _follow(self, computation: str, arguments: Sequence[_Value] | None) -> _Value:
    """Follows the program's arguments through a computation.

    Args:
      computation: its name.
      arguments: values of its parameters; None for those of the program.

    Returns:
      The value of the computation's result.
    """
    values: dict[str, _Value] = {}
    sizes: dict[str, int] = {}
    value: _Value = frozenset()
    for instruction in self._computations[computation]:
      operands = [values.get(name, frozenset()) for name in instruction.operands]
      value = frozenset()
      opcode = instruction.opcode.removesuffix("-start")
      if opcode == "parameter":
        value = _argument(instruction) if arguments is None else arguments[_number(instruction.line)]
      elif opcode == "tuple":
        value = operands
      elif opcode == "get-tuple-element":
        value = (
          operands[0][_number(instruction.line, "index=")] if isinstance(operands[0], list) else operands[0]
        )
      elif opcode in _ALIASES or opcode.endswith("-done"):
        value = operands[0]
      elif opcode == "call":
        (called,) = self._called(instruction, "to_apply")
        value = self._follow(called, operands)
      elif opcode == "while":
        # What a loop changes is computed; what it does not change keeps its place in the tuple.
        for body in self._called(instruction, "body"):
          self._follow(body, operands)
        value = operands[0]
      elif opcode == "conditional":
        for branch, operand in zip(
          self._called(instruction, "branch_computations"), operands[1:], strict=True
        ):
          value = self._follow(branch, [operand])
      elif opcode in COLLECTIVES:
        value = _union(operands)
        self.collectives.append(Use(instruction, value))
      elif not self._is_new(instruction):
        pairs = zip(instruction.operands, operands, strict=True)
        value = _union([operand for name, operand in pairs if sizes.get(name) == instruction.size])
        if value:
          self.copies.append(Use(instruction, value))
      values[instruction.name], sizes[instruction.name] = value, instruction.size
    return value

  def _called(self, instruction: Instruction, attribute: str) -> list[str]:
    """Names of the computations in an attribute of an instruction."""
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|[^,\s]+)", instruction.line)
    return re.findall(r"%?([\w.-]+)", found[1]) if found else []

  def _is_new(self, instruction: Instruction) -> bool:
    """Whether the result is no changed copy of an operand, for a fusion because of what is inside."""
    inside = [i.opcode for name in self._called(instruction, "calls") for i in self._computations[name]]
    return not _NEW.isdisjoint([instruction.opcode, *inside])


def _parse(line: str) -> Instruction | None:
  """Parses a line such as `ROOT %name = f32[2,3]{1,0} opcode(%a, %b), attributes`; None if it is none."""
  if (head := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)) is None:
    return None
  # A tuple's shape holds blanks and parentheses, such as (f32[2]{0:T(128)}, s32[]).
  end = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
  shape, rest = line[head.end() : end], line[end:].lstrip()
  opcode = rest[: rest.index("(")]
  start = len(line) - len(rest) + len(opcode)
  operands = re.findall(r"%([\w.-]+)", line[start : _closing(line, start)])
  sizes = [
    math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w\[([\d,]*)\]", shape)
  ]
  return Instruction(head[1], opcode, tuple(sizes), tuple(operands), line.strip())


def _closing(line: str, start: int) -> int:
  """Place behind the parenthesis that closes the one at `start`."""
  depth = 0
  for place in range(start, len(line)):
    depth += {"(": 1, ")": -1}.get(line[place], 0)
    if depth == 0:
      return place + 1
  return len(line)


def _number(line: str, before: str = r"parameter\(") -> int:
  found = re.search(before + r"(\d+)", line)
  assert found is not None, line
  return int(found[1])


def _argument(instruction: Instruction) -> frozenset[str]:
  """Name of the program's argument: that of the key for an element of a dictionary."""
  name = re.search(r'op_name="([^"]*)"', instruction.line)
  if name is None:
    return frozenset()
  key = re.search(r"\[\\?'([^'\\]+)", name[1])
  return frozenset({key[1] if key else name[1]})


def _union(values: Sequence[_Value]) -> frozenset[str]:
  """All arguments in values."""
  leaves: Iterator[frozenset[str]] = (_union(value) if isinstance(value, list) else value for value in values)
  return frozenset().union(*leaves)
