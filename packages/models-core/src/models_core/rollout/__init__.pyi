from .backends import SGLANG, SGLANG_EXPERTS, SGLANG_GEMMA, VLLM, VLLM_FLAX, Backend, backend_mappings
from .checkpoint import LazyCheckpoint, from_checkpoint, iter_checkpoint, to_checkpoint

__all__ = [
  "SGLANG",
  "SGLANG_EXPERTS",
  "SGLANG_GEMMA",
  "VLLM",
  "VLLM_FLAX",
  "Backend",
  "LazyCheckpoint",
  "backend_mappings",
  "from_checkpoint",
  "iter_checkpoint",
  "to_checkpoint",
]
