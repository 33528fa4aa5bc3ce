"""Checkpoints as sharded Flax NNX modules, and back.

Names are imported from the rooms, each of which says in its docstring what it is for:

  layers    what models are made of: attention, KV cache, projections, norms, RoPE, the causal language model
  weights   how tensors of a checkpoint become parameters of a model, as data
  formats   files, headers and readers of safetensors, GGUF and Orbax
  config    config.json as fields of a configuration
  loading   from headers to arrays on devices
  saving    from arrays on devices to a directory
  adapters  LoRA: merged, read and written

Beside them lie `family`, the contract of an architecture, and the modules that users of `tunix.models` know:
`safetensors_loader`, `safetensors_saver`, `dummy_model_creator` and `digest`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  __version__: str
else:

  def __getattr__(name: str) -> str:
    # Not read at import, because importlib.metadata takes longer than all else here.
    if name == "__version__":
      from importlib.metadata import version

      return version("models-core")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
