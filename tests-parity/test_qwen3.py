"""Qwen 3, dense and mixture of experts: the logits and greedy continuations of transformers, with every option."""

import functools
import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from models_core.layers import load_balancing_loss
from models_qwen.qwen3.model import make_causal_attn_mask

# Nothing is at its default, and neither heads nor vocabulary divide by tp=4. The experts do.
BASE = {
  "vocab_size": 101,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 4,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "rms_norm_eps": 1e-2,
  "rope_parameters": {"rope_type": "default", "rope_theta": 321.5},
  "max_position_embeddings": 512,
  "tie_word_embeddings": False,
  "bos_token_id": None,
  "eos_token_id": None,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "rope_theta": 321.5, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}

CASES = {
  "dense": {},
  "dense, tied": {"tie_word_embeddings": True},
  "dense, window": WINDOW | {"max_window_layers": 1},
  "dense, yarn": {"rope_parameters": YARN},
  "sparse": EXPERTS,
  "sparse, tied": EXPERTS | {"tie_word_embeddings": True},
  "sparse, weights not normalised": EXPERTS | {"norm_topk_prob": False},
  "sparse, one expert a token": EXPERTS | {"num_experts_per_tok": 1, "norm_topk_prob": False},
  "sparse, all experts": EXPERTS | {"num_experts_per_tok": 8, "norm_topk_prob": False},
  "sparse, indivisible": EXPERTS | {"num_experts": 7},
  "sparse, every second layer": EXPERTS | {"decoder_sparse_step": 2},
  "sparse, some dense layers": EXPERTS | {"mlp_only_layers": [0, 2]},
  "sparse, window": EXPERTS | WINDOW,
  "sparse, yarn": EXPERTS | {"rope_parameters": YARN | {"beta_fast": 3.0, "attention_factor": 1.3}},
}
PLACES = ["one-jit", "explicit-jit", "auto-jit"]
LENGTHS = np.array([40, 23, 9, 31])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, open_checkpoint):
  @functools.cache
  def write(case: str, dtype: str = "float32", seed: int = 0):
    kind = "Qwen3Moe" if "sparse" in case else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(**BASE | CASES[case])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for name, weight in model.named_parameters():
        if weight.ndim == 1:
          weight.normal_(1.0, 0.3, generator=generator)
        else:
          gain = 1.5 if "_proj" in name else 1.0
          weight.normal_(0, gain * weight.shape[-1] ** -0.5, generator=generator)
    path = tmp_path_factory.mktemp("qwen3")
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return open_checkpoint(path)

  return write


@pytest.mark.parametrize("placement", PLACES, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_logits(checkpoint, case, placement, tokens, assert_parity):
  source = checkpoint(case)
  assert_parity(
    placement.logits(source.model(placement), tokens), source.logits(tokens), what=f"qwen3 {case}"
  )


@pytest.mark.parametrize("placement", ["explicit-eager", "auto-eager-inside"], indirect=True)
def test_eager_logits(checkpoint, placement, tokens, assert_parity):
  source = checkpoint("sparse")
  assert_parity(
    placement.logits(source.model(placement), tokens), source.logits(tokens), what="qwen3 sparse eager"
  )


@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
@pytest.mark.parametrize("case", ["dense, window", "sparse, window", "sparse, yarn"])
def test_padding_chunks_and_packing(checkpoint, case, placement, tokens, assert_parity):
  source = checkpoint(case)
  model = source.model(placement)
  for side in ("left", "right"):
    slots, lengths = np.arange(40)[None], LENGTHS[:, None]
    real = slots < lengths if side == "right" else slots >= 40 - lengths
    positions = np.cumsum(real, 1, dtype=np.int32) - 1
    theirs = source.logits(tokens, mask=real, positions=np.maximum(positions, 0))
    ours = placement.logits(model, tokens, np.where(real, positions, -1))
    assert_parity(ours[real], theirs[real], what=f"qwen3 {case} {side}")
    mask = np.asarray(make_causal_attn_mask(real))
    ours = placement.logits(model, tokens, np.maximum(positions, 0), attention_mask=mask)
    assert_parity(ours[real], theirs[real], what=f"qwen3 {case} {side} mask")
  cache, parts = model.init_cache(4, 43), []
  for start, stop in ((0, 7), (7, 8), (8, 30), (30, 40)):
    positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (4, stop - start))
    logits, cache = placement.call(model, tokens[:, start:stop], positions, cache)
    parts.append(np.asarray(logits))
  assert_parity(np.concatenate(parts, 1), source.logits(tokens), what=f"qwen3 {case} chunks")
  sizes = (5, 17, 18)
  segments = np.broadcast_to(np.repeat(np.arange(3, dtype=np.int32), sizes), (4, 40))
  positions = np.broadcast_to(np.concatenate([np.arange(n, dtype=np.int32) for n in sizes]), (4, 40))
  ours = placement.logits(model, tokens, positions, segment_ids=segments)
  theirs = [source.logits(part) for part in np.split(tokens, np.cumsum(sizes)[:-1], 1)]
  assert_parity(ours, np.concatenate(theirs, 1), what=f"qwen3 {case} packed")


@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit"], indirect=True)
@pytest.mark.parametrize("case", ["dense", "sparse", "sparse, window"])
def test_greedy_continuation(checkpoint, case, placement, tokens):
  source = checkpoint(case)
  ours = placement.greedy(source.model(placement), tokens[:, :7], 20)
  np.testing.assert_array_equal(ours, source.greedy(tokens[:, :7], 20))


def _layer(name: str) -> int:
  return int(re.search(r"layers\.(\d+)", name)[1])


def _fused(tensors: dict, layers) -> dict:
  """The experts of these layers as two tensors a layer, the way transformers 5 keeps them in memory."""
  experts = {n: t for n, t in tensors.items() if ".mlp.experts." in n and _layer(n) in layers}
  out = {n: t for n, t in tensors.items() if n not in experts}
  for i in layers:
    prefix = f"model.layers.{i}.mlp.experts"
    stack = lambda kind, p=prefix: torch.stack([experts[f"{p}.{e}.{kind}.weight"] for e in range(8)])
    out[f"{prefix}.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], 1)
    out[f"{prefix}.down_proj"] = stack("down_proj")
  return out


@pytest.mark.parametrize("placement", PLACES, indirect=True)
@pytest.mark.parametrize("fused", [(), (0, 1, 2, 3), (1, 3)], ids=["split", "fused", "mixed"])
def test_experts_split_fused_and_mixed(
  checkpoint, open_checkpoint, fused, placement, tokens, assert_parity, tmp_path
):
  source = checkpoint("sparse")
  tensors = safetensors.torch.load_file(source.path / "model.safetensors")
  assert "model.layers.0.mlp.experts.7.up_proj.weight" in tensors
  safetensors.torch.save_file(_fused(tensors, fused), tmp_path / "model.safetensors", {"format": "pt"})
  raw = json.loads((source.path / "config.json").read_text())
  # One spelling or the other.
  raw["num_local_experts" if fused else "num_experts"] = 8
  raw.pop("num_experts" if fused else "num_local_experts", None)
  (tmp_path / "config.json").write_text(json.dumps(raw))
  model = open_checkpoint(tmp_path).model(placement)
  assert_parity(placement.logits(model, tokens), source.logits(tokens), what="qwen3 experts in files")


def _errors_of_bfloat16(checkpoint, case, placement, tokens):
  """Ours and theirs against float32, over four models."""
  ours, theirs = [], []
  for seed in range(4):
    source = checkpoint(case, "bfloat16", seed)
    truth = source.logits(tokens)
    ours.append(np.abs(placement.logits(source.model(placement, "bfloat16"), tokens) - truth))
    theirs.append(np.abs(source.logits(tokens, dtype="bfloat16") - truth))
  return np.array(ours), np.array(theirs)


@pytest.mark.usefixtures("optimized")
# With experts on one device alone: a mesh rounds the parts of a sharded sum, which transformers has whole here.
@pytest.mark.parametrize(
  ("case", "placement"),
  [("dense", "one-jit"), ("dense", "auto-jit"), ("sparse, all experts", "one-jit")],
  indirect=["placement"],
)
def test_error_of_bfloat16(checkpoint, case, placement, many_tokens, assert_no_larger_error):
  assert_no_larger_error(*_errors_of_bfloat16(checkpoint, case, placement, many_tokens))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
def test_error_of_bfloat16_where_experts_are_chosen(checkpoint, placement, tokens):
  """Of the median token: a rounding that turns a choice of experts outweighs all others, on either side."""
  ours, theirs = (np.median(e.max(-1)) for e in _errors_of_bfloat16(checkpoint, "sparse", placement, tokens))
  print("qwen3 sparse bfloat16, median token", ours / theirs)
  assert ours <= theirs


@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit", "auto-jit"], indirect=True)
@pytest.mark.parametrize("case", ["sparse", "sparse, some dense layers"])
def test_router_logits_and_the_loss_that_balances_experts(checkpoint, case, placement, tokens, assert_parity):
  """The logits of each layer, the loss with and without padding, and its gradient."""
  source = checkpoint(case)
  model, reference = source.fresh_model(placement), source.fresh_reference()
  real = np.arange(40) < LENGTHS[:, None]

  def loss(model, mask):
    model(tokens, output_router_logits=True)
    routers = nnx.pop(model, nnx.Intermediate)["all_router_logits"].get_value()
    return load_balancing_loss(routers, 3, mask), routers

  for mask in (None, real):
    with placement.context():
      (ours, routers), grads = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model, mask)
    ids = torch.tensor(tokens, dtype=torch.long)
    # Padding on the right changes no token before it, so that all tokens are seen here, too.
    logits = reference(ids, output_router_logits=True).router_logits
    theirs = load_balancing_loss_func(logits, 8, 3, None if mask is None else torch.tensor(mask))
    reference.zero_grad()
    theirs.backward()
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-6)
    assert len(routers) == len(logits)
    for a, b in zip(routers, logits, strict=True):
      assert_parity(np.asarray(a).reshape(b.shape), b.detach().numpy(), what=f"qwen3 {case} router")
    last = len(reference.model.layers) - 1
    expected = reference.model.layers[last].mlp.gate.weight.grad.numpy()
    assert_parity(grads.layers[last].mlp.router.w[...], expected, what=f"qwen3 {case} gradient of the router")
