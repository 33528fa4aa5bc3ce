"""What type checkers must find: checked, and never run. mypy refuses an `ignore` that nothing needs.

The same comments hold for pyright, which reads `type: ignore`, too.
"""

from typing import assert_type

import jax
import jax.numpy as jnp

from models_automodel import AutoModel, LoadPlan
from models_core.layers import Cache, CausalLM

tokens = jnp.zeros((1, 3), jnp.int32)

model, path = AutoModel.from_pretrained(
  "org/model", dtype="bfloat16", remat_config="DECODER", layers=range(2)
)
assert_type(model, CausalLM)
assert_type(path, str)
assert_type(AutoModel.plan("org/model", num_layers=2), LoadPlan)

AutoModel.from_pretrained("org/model", dtpye="bfloat16")  # type: ignore[call-arg]
AutoModel.from_pretrained("org/model", num_layer=2)  # type: ignore[call-arg]
AutoModel.from_pretrained("org/model", num_layers="two")  # type: ignore[arg-type]
AutoModel.plan("org/model", strict_shardin=True)  # type: ignore[call-arg]

logits, nothing = model(tokens)
assert_type(logits, jax.Array)
assert_type(nothing, None)
logits, cache = model(tokens, None, model.init_cache(1, 8))
assert_type(cache, Cache)
logits, cache = model(tokens, cache=cache, skip_lm_head=True)


def with_or_without(maybe: Cache | None) -> None:
  assert_type(model(tokens, None, maybe), tuple[jax.Array, Cache | None])
