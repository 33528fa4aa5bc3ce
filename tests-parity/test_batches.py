"""Padding, chunks, caches and packing give the numbers of the plain sequence."""

import numpy as np
import pytest

from models_llama.llama3.model import make_causal_attn_mask

LENGTHS = (40, 23, 9, 31)

# Caches and heads that the mesh cannot shard, and such that it can; eagerly the former alone.
EAGER = [("untied", "explicit-eager-inside"), ("untied", "auto-eager")]
COMPILED = [
  (variant, placement)
  for variant in ("untied", "divisible-tied")
  for placement in ("one-jit", "explicit-jit", "auto-jit-inside")
]
compiled = pytest.mark.parametrize(("variant", "placement"), COMPILED, indirect=True)
everywhere = pytest.mark.parametrize(("variant", "placement"), EAGER + COMPILED, indirect=True)


def _padding(side, lengths=LENGTHS, T=40):
  """bool [B, T], True for tokens."""
  slots = np.arange(T)[None]
  lengths = np.asarray(lengths)[:, None]
  return slots < lengths if side == "right" else slots >= T - lengths


def _plain(source, tokens, real):
  """transformers' logits of each row without its padding."""
  return [source.logits(row[keep][None])[0] for row, keep in zip(tokens, real, strict=True)]


@everywhere
@pytest.mark.parametrize("by", ["attention_mask", "negative_positions"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(checkpoint, variant, side, by, placement, tokens, assert_parity):
  source, real = checkpoint(variant), _padding(side)
  positions = np.cumsum(real, 1, dtype=np.int32) - 1
  if by == "attention_mask":
    positions, arguments = (
      np.maximum(positions, 0),
      {"attention_mask": np.asarray(make_causal_attn_mask(real))},
    )
  else:
    positions, arguments = np.where(real, positions, -1), {}
  logits = placement.logits(source.model(placement), tokens, positions, **arguments)
  theirs = source.logits(tokens, mask=real, positions=np.maximum(positions, 0))
  assert_parity(logits[real], theirs[real], what=f"{side} {by}, padded by both")
  assert_parity(logits[real], np.concatenate(_plain(source, tokens, real)), what=f"{side} {by}, unpadded")


@pytest.mark.parametrize(("variant", "placement"), COMPILED[1:4], indirect=True)
@pytest.mark.parametrize("by", ["attention_mask", "negative_positions"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_then_tokens_one_by_one(
  checkpoint, variant, side, by, placement, tokens, assert_parity
):
  """Prompts of different lengths in one batch, then the same number of tokens for each row."""
  P, new, lengths = 16, 4, (16, 3, 9, 12)
  source, real = checkpoint(variant), _padding(side, lengths, P)
  model, B = source.model(placement), len(lengths)
  positions = np.cumsum(real, 1, dtype=np.int32) - 1
  whole = np.concatenate([real, np.ones((B, new), bool)], 1)
  if by == "negative_positions":
    positions, prompt_mask = np.where(real, positions, -1), None
  else:
    positions, prompt_mask = np.maximum(positions, 0), np.asarray(make_causal_attn_mask(real))
  logits, cache = placement.call(
    model, tokens[:, :P], positions, model.init_cache(B, P + new + 3), prompt_mask
  )
  steps = [np.asarray(logits)]
  for t in range(new):
    step = tokens[:, P + t : P + t + 1]
    # Always as long as the whole, so that one compiled step serves all.
    seen = np.where(np.arange(P + new) <= P + t, whole, False)[:, None] if prompt_mask is not None else None
    logits, cache = placement.call(
      model, step, np.asarray(lengths, np.int32)[:, None] + np.int32(t), cache, seen
    )
    steps.append(np.asarray(logits))
  logits = np.concatenate(steps, 1)
  assert_parity(
    logits[whole], np.concatenate(_plain(source, tokens[:, : P + new], whole)), what=f"{side} {by}"
  )


# Chunks of a row's 40 tokens, and how many slots the cache has beyond them.
CHUNKS = {
  "token by token": ((1,) * 40, 0),
  "prompt, then token by token": ((34,) + (1,) * 6, 1),
  "uneven chunks": ((7, 1, 24, 7, 1), 9),
}


def _chunked(source, chunks, placement, tokens):
  sizes, spare = CHUNKS[chunks]
  model, start, steps = source.model(placement), 0, []
  cache = model.init_cache(4, 40 + spare)
  for size in sizes:
    positions = np.broadcast_to(np.arange(start, start + size, dtype=np.int32), (4, size))
    logits, cache = placement.call(model, tokens[:, start : start + size], positions, cache)
    steps.append(np.asarray(logits))
    start += size
  return np.concatenate(steps, 1)


@compiled
@pytest.mark.parametrize("chunks", ["token by token", "uneven chunks"])
def test_cache(checkpoint, variant, chunks, placement, tokens, assert_parity):
  source = checkpoint(variant)
  assert_parity(_chunked(source, chunks, placement, tokens), source.logits(tokens), what=chunks)


@pytest.mark.parametrize(("variant", "placement"), EAGER, indirect=True)
def test_cache_eagerly(checkpoint, variant, placement, tokens, assert_parity):
  source = checkpoint(variant)
  logits = _chunked(source, "prompt, then token by token", placement, tokens)
  assert_parity(logits, source.logits(tokens))


@everywhere
@pytest.mark.parametrize("by", ["attention_mask", "segment_ids"])
def test_packed_sequences(checkpoint, variant, by, placement, tokens, assert_parity):
  """Two to four sequences a row, then padding; positions restart. Each has the logits that it has alone."""
  source, rows = checkpoint(variant), ((40,), (11, 29), (5, 17, 10), (1, 2, 3, 30))
  segments, positions = np.zeros((4, 40), np.int32), np.zeros((4, 40), np.int32)
  for b, sizes in enumerate(rows):
    ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    segments[b, : len(ids)] = ids
    positions[b, : len(ids)] = np.concatenate([np.arange(size) for size in sizes])
  if by == "segment_ids":
    arguments = {"segment_ids": segments}
  else:
    same = segments[:, :, None] == segments[:, None, :]
    arguments = {"attention_mask": same & np.tril(np.ones((40, 40), bool))}
  logits = placement.logits(source.model(placement), tokens, positions, **arguments)
  for b, sizes in enumerate(rows):
    for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
      part = slice(start, start + size)
      assert_parity(logits[b, part], source.logits(tokens[b : b + 1, part])[0], what=by)
