"""Where a client cannot do what a case asks, whatever the model: the error that it raises, and why.

The client's own model must fail there, too; `subjects.cells` runs both.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
  """An expected failure.

  Attributes:
    message: regular expression that the message of the error contains.
    reason: one sentence for the table of results.
  """

  message: str
  reason: str


_GRPO = Fault(
  "Expected aliased input|out sharding could not be resolved|can only refer to Auto axes",
  "RLCluster enters meshes by `with mesh:` alone, which hides Explicit axes from JAX, and its trainer's constraints on "
  "the optimizer are for Auto axes; with the same devices as an Auto mesh it works",
)
_NF4 = Fault("lies at", "qwix's conversion to nf4 keeps the sharding of a weight's first axis only")

# Case and placement -> fault.
FAULTS: dict[tuple[str, str], Fault] = {
  ("sampler", "Explicit"): Fault(
    "operand sharding must be equal to update sharding",
    "the sampler makes its buffers on no mesh, and writes logits of an Explicit mesh into them; within jax.set_mesh it "
    "works",
  ),
  ("GRPO", "Explicit"): _GRPO,
  ("GRPO", "Explicit, set_mesh"): _GRPO,
  ("sharding of nf4 weights", "Auto"): _NF4,
  ("sharding of nf4 weights", "Explicit"): _NF4,
}
