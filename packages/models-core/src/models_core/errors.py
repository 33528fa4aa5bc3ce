"""The errors of the house: each says what, where and what to do."""

from collections.abc import Sequence


class ModelsError(Exception):
  """Root of all errors raised here. Each subclass also derives from the built-in that fits it."""


class CheckpointError(ModelsError, ValueError):
  """A checkpoint that cannot be loaded: all of its problems at once.

  Attributes:
    problems: one sentence for each problem.
  """

  def __init__(self, where: str, problems: Sequence[str]):
    self.where = where
    self.problems = tuple(problems)
    count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
    super().__init__("\n  - ".join([f"{where}: {count}", *self.problems]))


class ConfigError(ModelsError, ValueError):
  """A configuration that is incomplete, contradicts itself or asks for what a model cannot do."""


class ShardingError(ModelsError, ValueError):
  """A sharding that a mesh cannot hold."""


class AdapterError(ModelsError, ValueError):
  """A LoRA adapter that does not fit a model, or is of a kind that is not implemented."""


class CacheError(ModelsError, ValueError):
  """More tokens than a KV cache has room for."""


class SaveError(ModelsError, OSError):
  """A checkpoint that cannot be written. What was at its place before is still there.

  Attributes:
    errno: of the system's error, if there was one.
  """

  def __init__(self, message: str, number: int | None = None):
    super().__init__(message)
    self.errno = number
