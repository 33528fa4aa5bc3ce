"""Gemma 1, 2 and 3: logits and greedy continuations of transformers, on every kind of mesh, in every way of calling."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

# Nothing is at its default, and windows are shorter than the sequences of 40 tokens.
SIZES = {
  "vocab_size": 101,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "rms_norm_eps": 1e-2,
  "max_position_embeddings": 512,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": None,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 321.5}}
GEMMA2 = ROPE | {
  "query_pre_attn_scalar": 9,
  "sliding_window": 5,
  "attn_logit_softcapping": 1.5,
  "final_logit_softcapping": 6.0,
}
GEMMA3 = {
  "query_pre_attn_scalar": 9,
  "sliding_window": 5,
  "sliding_window_pattern": 2,
  "rope_parameters": {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 33.0},
  },
}
TYPES = ["full_attention", "sliding_attention", "sliding_attention"]

# variant -> (architecture, what differs from SIZES).
VARIANTS = {
  "gemma": ("Gemma", ROPE),
  "gemma-mqa": ("Gemma", ROPE | {"num_key_value_heads": 1}),
  "gemma-mha": ("Gemma", ROPE | {"num_key_value_heads": 6, "vocab_size": 104}),
  "gemma-untied": ("Gemma", ROPE | {"tie_word_embeddings": False}),
  "gemma2": ("Gemma2", GEMMA2),
  "gemma2-untied": ("Gemma2", GEMMA2 | {"tie_word_embeddings": False}),
  "gemma2-types": ("Gemma2", GEMMA2 | {"layer_types": TYPES, "num_key_value_heads": 1}),
  "gemma2-no-caps": ("Gemma2", GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
  "gemma3": ("Gemma3", GEMMA3),
  "gemma3-untied": ("Gemma3", GEMMA3 | {"tie_word_embeddings": False}),
  "gemma3-divisible": (
    "Gemma3",
    GEMMA3 | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 104},
  ),
  "gemma3-five-to-one": (
    "Gemma3",
    GEMMA3 | {"sliding_window_pattern": 6, "final_logit_softcapping": 6.0, "num_hidden_layers": 7},
  ),
}
# Each kind of layer and norm once.
MAIN = ["gemma", "gemma2", "gemma3"]
EVERYWHERE = ["one-jit", "explicit-jit", "auto-jit"]


def randomize(model, seed):
  """Weights that keep activations at O(1) and make attention pick; norms multiply by 1 + w."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim == 1:
        weight.uniform_(-0.5, 0.5, generator=generator)
      elif "embed_tokens" in name:
        weight.normal_(0, 0.3, generator=generator)
      else:
        gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
        weight.normal_(0, gain * weight.shape[1] ** -0.5, generator=generator)


def make_reference(variant, seed=0, **changes):
  """A random model of transformers in float32. Its eager attention is the one that knows soft caps."""
  architecture, fields = VARIANTS[variant]
  config_class = getattr(
    transformers, "Gemma3TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
  )
  model_class = getattr(transformers, f"{architecture}ForCausalLM")
  config = config_class(**SIZES | fields | changes)
  model = model_class._from_config(config, attn_implementation="eager").eval()
  randomize(model, seed)
  return model


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint, and transformers' model of it."""

  checkpoint: object
  reference: torch.nn.Module

  def model(self, placement, dtype="float32"):
    return self.checkpoint.model(placement, dtype)

  def logits(self, tokens, dtype=torch.float32):
    model = self.reference.to(dtype)
    with torch.no_grad():
      out = model(torch.tensor(np.asarray(tokens), dtype=torch.long), use_cache=False).logits.float().numpy()
    self.reference.to(torch.float32)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory, open_checkpoint):
  """`source(variant, seed=0, dtype="float32")`: written once."""

  @functools.cache
  def write(variant, seed=0, dtype="float32"):
    path = tmp_path_factory.mktemp(variant)
    model = make_reference(variant, seed).to(getattr(torch, dtype))
    model.save_pretrained(path)
    return Source(open_checkpoint(path), model.to(torch.float32))

  return write


def positions_of(tokens):
  return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


@pytest.mark.parametrize("placement", EVERYWHERE, indirect=True)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits(source, name, placement, tokens, assert_parity):
  theirs = source(name)
  assert_parity(placement.logits(theirs.model(placement), tokens), theirs.logits(tokens), what=name)


@pytest.mark.parametrize("placement", ["one-eager", "explicit-eager", "auto-eager-inside"], indirect=True)
@pytest.mark.parametrize("name", MAIN)
def test_logits_eagerly(source, name, placement, tokens, assert_parity):
  theirs = source(name)
  assert_parity(placement.logits(theirs.model(placement), tokens), theirs.logits(tokens), what=name)


# A variant -> fields without which its logits must differ.
MATTERS = [
  ("gemma2", {"attn_logit_softcapping": None}),
  ("gemma2", {"final_logit_softcapping": None}),
  ("gemma2", {"sliding_window": 40}),
  ("gemma2", {"query_pre_attn_scalar": 16}),
  ("gemma3", {"sliding_window": 40}),
  ("gemma3", {"query_pre_attn_scalar": 16}),
  ("gemma3", {"sliding_window_pattern": 3}),
  ("gemma3", {"rope_parameters": GEMMA3["rope_parameters"] | {"full_attention": {"rope_type": "default", "rope_theta": 900.0}}}),
  ("gemma3", {"rope_parameters": GEMMA3["rope_parameters"] | {"sliding_attention": {"rope_type": "default", "rope_theta": 900.0}}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "without"), MATTERS)
def test_a_field_matters(name, without, tokens):
  """By a thousand tolerances, in transformers."""
  whole, other = (
    make_reference(name, **changes)(torch.tensor(tokens)).logits.detach() for changes in ({}, without)
  )
  assert (whole - other).abs().max() > 1000 * 2e-5 * whole.abs().max()


# --- Padding, caches, packing ----------------------------------------------------------------------------------

# Chunks of a row's 40 tokens: longer and shorter than the window of 5.
CHUNKS = {
  "one": (40,),
  "prompt, then token by token": (33, *(1,) * 7),
  "uneven": (3, 1, 11, 11, 3, 11),
}


def chunked(model, placement, tokens, positions, chunks, ring, mask=None):
  """Logits [B, T, V] by parts through a cache with some slots to spare."""
  B, T = tokens.shape
  cache, start, parts = model.init_cache(B, T + 9, ring=ring), 0, []
  for size in chunks:
    cut = np.s_[:, start : start + size]
    logits, cache = placement.call(
      model, tokens[cut], positions[cut], cache, None if mask is None else mask[cut]
    )
    parts.append(np.asarray(logits))
    start += size
  return np.concatenate(parts, 1), cache


@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit"], indirect=True)
@pytest.mark.parametrize("ring", [False, True], ids=["whole", "ring"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", MAIN)
def test_cache(source, name, chunks, ring, placement, tokens, assert_parity):
  theirs = source(name)
  model = theirs.model(placement)
  logits, cache = chunked(model, placement, tokens, positions_of(tokens), CHUNKS[chunks], ring)
  assert_parity(logits, theirs.logits(tokens), what=f"{name} {'ring' if ring else 'whole'}")
  windows = model.windows() if ring else [None] * len(cache)
  assert [layer["k"].shape[-1] for layer in cache.values()] == [window or 49 for window in windows]


@pytest.mark.parametrize("placement", ["one-jit", "auto-jit"], indirect=True)
@pytest.mark.parametrize("ring", [False, True], ids=["whole", "ring"])
@pytest.mark.parametrize("by", ["negative positions", "mask"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_left_padding(source, name, by, ring, placement, tokens, assert_parity):
  theirs, lengths = source(name), np.array([40, 23, 9, 31])[:, None]
  real = np.arange(40) >= 40 - lengths
  positions = np.cumsum(real, 1, dtype=np.int32) - 1
  mask = None
  if by == "mask":
    # What samplers do: padding at position 0, hidden by a mask.
    positions = np.maximum(positions, 0)
    mask = np.tril(np.ones((40, 40), bool)) & real[:, None]
  model = theirs.model(placement)
  logits, _ = chunked(model, placement, tokens, positions, CHUNKS["uneven"], ring, mask)
  for row in range(4):
    expected = theirs.logits(tokens[row, real[row]][None])[0]
    assert_parity(logits[row, real[row]], expected, what=f"{name} {'ring' if ring else 'whole'}")


@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit"], indirect=True)
@pytest.mark.parametrize("name", MAIN)
def test_packed_sequences(source, name, placement, tokens, assert_parity):
  """Two or more sequences a row; positions restart. Each has the logits that it has alone."""
  theirs, rows = source(name), ((40,), (11, 29), (5, 17, 18), (1, 2, 3, 34))
  segments = np.stack([np.repeat(np.arange(len(sizes)), sizes) for sizes in rows]).astype(np.int32)
  positions = np.stack([np.concatenate([np.arange(size) for size in sizes]) for sizes in rows]).astype(
    np.int32
  )
  logits = placement.logits(theirs.model(placement), tokens, positions, segment_ids=segments)
  for row, sizes in enumerate(rows):
    for segment in range(len(sizes)):
      at = segments[row] == segment
      assert_parity(logits[row, at], theirs.logits(tokens[row, at][None])[0], what=name)


@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit"], indirect=True)
@pytest.mark.parametrize("ring", [False, True], ids=["whole", "ring"])
@pytest.mark.parametrize("name", MAIN)
def test_greedy_continuation(source, name, ring, placement, tokens):
  theirs, prompt, new = source(name), tokens[:, :7], 24
  model, out = theirs.model(placement), []
  expected = theirs.reference.generate(
    torch.tensor(prompt, dtype=torch.long), do_sample=False, max_new_tokens=new, pad_token_id=0
  )[:, 7:].numpy()
  logits, cache = placement.call(model, prompt, positions_of(prompt), model.init_cache(4, 7 + new, ring=ring))
  for position in range(7, 7 + new):
    out.append(np.argmax(np.asarray(logits)[:, -1:], -1).astype(np.int32))
    if len(out) < new:
      logits, cache = placement.call(model, out[-1], np.full((4, 1), position, np.int32), cache)
  np.testing.assert_array_equal(np.concatenate(out, 1), expected)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit"], indirect=True)
@pytest.mark.parametrize("name", MAIN)
def test_error_of_bfloat16(source, name, placement, many_tokens, assert_no_larger_error):
  """Against float32 on the same weights, it is no larger than transformers' own."""
  ours, theirs = [], []
  for seed in range(4):
    checkpoint = source(name, seed, "bfloat16")
    truth = checkpoint.logits(many_tokens)
    logits = placement.logits(checkpoint.model(placement, "bfloat16"), many_tokens)
    assert jnp.dtype(logits.dtype) == jnp.float32
    ours.append(np.abs(logits - truth))
    theirs.append(np.abs(checkpoint.logits(many_tokens, torch.bfloat16) - truth))
  assert_no_larger_error(ours, theirs)
