"""Llama models as Flax NNX modules."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  __version__: str
else:

  def __getattr__(name: str) -> str:
    # Not read at import, because importlib.metadata takes longer than all else here.
    if name == "__version__":
      from importlib.metadata import version

      return version("models-llama")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
