"""What all trees that tunix saves of its own Gemma models share."""

from __future__ import annotations

L = "layers.{i}"
ATTN = f"{L}.attn"

COMMON = (
  # ours                      tunix, layout: tunix -> ours
  (f"{L}.input_layernorm.w",  [(f"{L}.pre_attention_norm.scale", "d")]),
  (f"{L}.attn.q_proj.w",      [(f"{ATTN}.q_einsum.w", "n d h -> (n h) d"), (f"{ATTN}.qkv_einsum.w", "0/3 n d h -> (n h) d")]),
  (f"{L}.attn.k_proj.w",      [(f"{ATTN}.kv_einsum.w", "0/2 k d h -> (k h) d"), (f"{ATTN}.qkv_einsum.w", "1/3 k d h -> (k h) d")]),
  (f"{L}.attn.v_proj.w",      [(f"{ATTN}.kv_einsum.w", "1/2 k d h -> (k h) d"), (f"{ATTN}.qkv_einsum.w", "2/3 k d h -> (k h) d")]),
  (f"{L}.attn.o_proj.w",      [(f"{ATTN}.attn_vec_einsum.w", "n h d -> d (n h)")]),
  (f"{L}.pre_ffw_norm.w",     [(f"{L}.pre_ffw_norm.scale", "d")]),
  (f"{L}.post_ffw_norm.w",    [(f"{L}.post_ffw_norm.scale", "d")]),
  ("final_norm.w",            [("final_norm.scale", "d")]),
)  # fmt: skip
