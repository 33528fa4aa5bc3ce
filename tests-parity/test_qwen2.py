"""Qwen 2.5: the logits and greedy continuations of transformers, with every option of config.json."""

import functools

import numpy as np
import pytest
import torch
import transformers

from models_qwen.qwen2.model import make_causal_attn_mask

# Nothing is at its default, and no axis but the feed-forward block's divides by tp=4.
BASE = {
  "vocab_size": 101,
  "hidden_size": 60,
  "intermediate_size": 88,
  "num_hidden_layers": 4,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-2,
  "rope_parameters": {"rope_type": "default", "rope_theta": 321.5},
  "max_position_embeddings": 512,
  "tie_word_embeddings": False,
  "bos_token_id": None,
  "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 321.5, "factor": 4.0, "original_max_position_embeddings": 16}
DIVISIBLE = {"vocab_size": 104, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}

CASES = {
  "untied": {},
  "tied": {"tie_word_embeddings": True},
  "divisible": DIVISIBLE,
  "window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  "window everywhere": DIVISIBLE | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
  "window by layer_types": {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
  },
  "inert window": {"use_sliding_window": False, "sliding_window": 2, "max_window_layers": 1},
  "yarn": {"rope_parameters": YARN},
  "yarn, attention_factor": {"rope_parameters": YARN | {"attention_factor": 1.7, "attn_factor": 9.0}},
  "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.2}},
  "yarn, betas": {"rope_parameters": YARN | {"beta_fast": 3.0, "beta_slow": 0.4, "truncate": False}},
}
PLACES = ["one-jit", "explicit-jit", "auto-jit"]
LENGTHS = np.array([40, 23, 9, 31])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, open_checkpoint):
  @functools.cache
  def write(case: str, dtype: str = "float32", seed: int = 0):
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**BASE | CASES[case])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for name, weight in model.named_parameters():
        if weight.ndim == 1:
          scale, shift = (0.5, 0.0) if name.endswith("bias") else (0.3, 1.0)
          weight.normal_(shift, scale, generator=generator)
        else:
          gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
          weight.normal_(0, gain * weight.shape[-1] ** -0.5, generator=generator)
    path = tmp_path_factory.mktemp("qwen2")
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return open_checkpoint(path)

  return write


@pytest.mark.parametrize("placement", PLACES, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_logits(checkpoint, case, placement, tokens, assert_parity):
  source = checkpoint(case)
  assert_parity(
    placement.logits(source.model(placement), tokens), source.logits(tokens), what=f"qwen2 {case}"
  )


@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
@pytest.mark.parametrize("case", ["window", "yarn", "tied"])
def test_padding_chunks_and_packing(checkpoint, case, placement, tokens, assert_parity):
  source = checkpoint(case)
  model = source.model(placement)
  for side in ("left", "right"):
    slots, lengths = np.arange(40)[None], LENGTHS[:, None]
    real = slots < lengths if side == "right" else slots >= 40 - lengths
    positions = np.cumsum(real, 1, dtype=np.int32) - 1
    theirs = source.logits(tokens, mask=real, positions=np.maximum(positions, 0))
    ours = placement.logits(model, tokens, np.where(real, positions, -1))
    assert_parity(ours[real], theirs[real], what=f"qwen2 {case} {side}")
    mask = np.asarray(make_causal_attn_mask(real))
    ours = placement.logits(model, tokens, np.maximum(positions, 0), attention_mask=mask)
    assert_parity(ours[real], theirs[real], what=f"qwen2 {case} {side} mask")
  cache, parts = model.init_cache(4, 43), []
  for start, stop in ((0, 7), (7, 8), (8, 30), (30, 40)):
    positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (4, stop - start))
    logits, cache = placement.call(model, tokens[:, start:stop], positions, cache)
    parts.append(np.asarray(logits))
  assert_parity(np.concatenate(parts, 1), source.logits(tokens), what=f"qwen2 {case} chunks")
  sizes = (5, 17, 18)
  segments = np.broadcast_to(np.repeat(np.arange(3, dtype=np.int32), sizes), (4, 40))
  positions = np.broadcast_to(np.concatenate([np.arange(n, dtype=np.int32) for n in sizes]), (4, 40))
  ours = placement.logits(model, tokens, positions, segment_ids=segments)
  theirs = [source.logits(part) for part in np.split(tokens, np.cumsum(sizes)[:-1], 1)]
  assert_parity(ours, np.concatenate(theirs, 1), what=f"qwen2 {case} packed")


@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit"], indirect=True)
@pytest.mark.parametrize("case", ["untied", "window", "yarn, mscale"])
def test_greedy_continuation(checkpoint, case, placement, tokens):
  source = checkpoint(case)
  ours = placement.greedy(source.model(placement), tokens[:, :7], 20)
  np.testing.assert_array_equal(ours, source.greedy(tokens[:, :7], 20))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
def test_error_of_bfloat16(checkpoint, placement, many_tokens, assert_no_larger_error):
  ours, theirs = [], []
  for seed in range(4):
    source = checkpoint("untied", "bfloat16", seed)
    truth = source.logits(many_tokens)
    ours.append(np.abs(placement.logits(source.model(placement, "bfloat16"), many_tokens) - truth))
    theirs.append(np.abs(source.logits(many_tokens, dtype="bfloat16") - truth))
  assert_no_larger_error(ours, theirs)


@pytest.mark.parametrize(
  "case", [case for case in CASES if case not in ("untied", "tied", "divisible", "inert window")]
)
def test_an_option_matters(checkpoint, case, tokens):
  """Without it transformers' logits differ by a thousand tolerances."""
  source = checkpoint(case)
  config, plain = source.reference().config, transformers.Qwen2Config(**BASE)
  for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"):
    setattr(plain, key, getattr(config, key))
  model = transformers.Qwen2ForCausalLM(plain).eval()
  model.load_state_dict(source.reference().state_dict())
  with torch.no_grad():
    without = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  theirs = source.logits(tokens)
  assert np.abs(without - theirs).max() > 1000 * 2e-5 * np.abs(theirs).max()
