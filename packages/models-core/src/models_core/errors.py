"""The exceptions of all packages. Each message says what is wrong, where, and what to do about it."""

from collections.abc import Sequence
from typing import Any


class ModelsError(Exception):
  """Root of all exceptions of these packages. Each subclass also derives from the matching built-in exception."""


class CheckpointError(ModelsError, ValueError):
  """A checkpoint cannot be loaded. The error lists all problems at once.

  Attributes:
    where: the path or address of the checkpoint.
    problems: one sentence for each problem.
  """

  def __init__(self, where: str, problems: Sequence[str]):
    self.where = where
    self.problems = tuple(problems)
    count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
    super().__init__("\n  - ".join([f"{where}: {count}", *self.problems]))

  def __reduce__(self) -> tuple[Any, ...]:
    # An exception is unpickled from its message otherwise, and a process pool waits forever for one that cannot be.
    return type(self), (self.where, self.problems), self.__dict__


class ConfigError(ModelsError, ValueError):
  """A configuration is incomplete, contradicts itself, or asks for something that the model does not support."""


class ShardingError(ModelsError, ValueError):
  """A mesh cannot hold a sharding."""


class AdapterError(ModelsError, ValueError):
  """A LoRA adapter does not fit a model, or is of a kind that is not supported."""


class CacheError(ModelsError, ValueError):
  """A KV cache has no room for the tokens that it should take."""


class SaveError(ModelsError, OSError):
  """A checkpoint cannot be written. The previous contents of its directory are unchanged.

  Attributes:
    errno: the error number of the operating system, or None.
  """

  def __init__(self, message: str, number: int | None = None):
    super().__init__(message)
    self.errno = number

  def __reduce__(self) -> tuple[Any, ...]:
    return type(self), (str(self), self.errno), self.__dict__
