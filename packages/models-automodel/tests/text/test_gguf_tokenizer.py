"""SentencePiece vocabularies of GGUF metadata, and metadata that is refused."""

import itertools
import random

import numpy as np
import pytest

from models_automodel.text import load_tokenizer
from models_core.errors import CheckpointError
from models_core.formats import GgufCheckpoint, LocalFiles

SPACE = "\u2581"


def pieces(rng):
  """A vocabulary of scored pieces: (text, score, type)."""
  found = [
    ("<pad>", 0.0, 3),
    ("<eos>", 0.0, 3),
    ("<bos>", 0.0, 3),
    ("<unk>", 0.0, 2),
    ("<end_of_turn>", 0.0, 3),
  ]
  found += [(SPACE * n, 0.0, 4) for n in (2, 3)] + [("\n\n", 0.0, 4), ("<b>", 0.0, 4)]
  found += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
  letters = f"abcd{SPACE}\n"
  words = set()
  while len(words) < 120:
    word = "".join(rng.choice(letters) for _ in range(rng.randrange(2, 6)))
    words |= {word[:n] for n in range(2, len(word) + 1)}
  words = [w for w in sorted(words) if not any(w == p for p, _, _ in found)]
  rng.shuffle(words)
  found += [(word, -1.0 - i, 1) for i, word in enumerate(words)]
  return found + [(c, -1000.0 - i, 1) for i, c in enumerate(letters)]


def metadata(vocabulary, **keys):
  text, score, kind = zip(*vocabulary, strict=True)
  found = {
    "model": "llama",
    "pre": "default",
    "tokens": text,
    "scores": np.float32(score),
    "token_type": np.int32(kind),
    "bos_token_id": 2,
    "eos_token_id": 1,
    "unknown_token_id": 3,
    "add_bos_token": True,
    "add_space_prefix": False,
  }
  return {f"tokenizer.ggml.{k}": v for k, v in (found | keys).items() if v is not None}


def from_metadata(values):
  return load_tokenizer(GgufCheckpoint(LocalFiles("m.gguf"), {}, values))


def merge_by_score(text, vocabulary):
  """SentencePiece's BPE, slowly: user-defined pieces first, then the best pair again and again."""
  table = {piece: (score, i) for i, (piece, score, kind) in enumerate(vocabulary) if kind == 1}
  whole = {piece: i for i, (piece, _, kind) in enumerate(vocabulary) if kind == 4}
  byte = {piece: i for i, (piece, _, kind) in enumerate(vocabulary) if kind == 6}
  text, ids, stretch = text.replace(" ", SPACE), [], []

  def flush():
    while True:
      pairs = [
        (-table[a + b][0], i) for i, (a, b) in enumerate(itertools.pairwise(stretch)) if a + b in table
      ]
      if not pairs:
        break
      _, i = min(pairs)
      stretch[i : i + 2] = [stretch[i] + stretch[i + 1]]
    for piece in stretch:
      ids.extend([table[piece][1]] if piece in table else [byte[f"<0x{b:02X}>"] for b in piece.encode()])
    stretch.clear()

  while text:
    match = max((w for w in whole if text.startswith(w)), key=len, default=None)
    if match:
      flush()
      ids.append(whole[match])
    else:
      stretch.append(text[0])
    text = text[len(match or text[0]) :]
  flush()
  return ids


@pytest.mark.parametrize("spelling", [SPACE, " "])
def test_sentence_pieces_merge_by_score(spelling):
  rng = random.Random(0)
  vocabulary = pieces(rng)
  # Converters spell the spaces of user-defined pieces in either way.
  spelled = [(p.replace(SPACE, spelling) if kind == 4 else p, score, kind) for p, score, kind in vocabulary]
  tokenizer = from_metadata(metadata(spelled))
  assert tokenizer.stop_ids == {1, 4}
  for _ in range(300):
    text = "".join(rng.choice("abcdabcd  \né😀") for _ in range(rng.randrange(1, 40)))
    ids = tokenizer.encode(text)
    assert ids == [2, *merge_by_score(text, vocabulary)]
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text


def test_sentence_pieces_with_a_space_in_front():
  vocabulary = [p for p in pieces(random.Random(0)) if p[2] != 4]
  tokenizer = from_metadata(metadata(vocabulary, add_space_prefix=None, add_bos_token=None))
  for text in ("ab", "ab cd", "  a", "b 😀 c"):
    ids = tokenizer.encode(text)
    assert ids == [2, *merge_by_score(f" {text}", vocabulary)]
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text


# Refusals.

VOCABULARY = pieces(random.Random(0))
COUNT = len(VOCABULARY)
WRONG = {
  "model": ({"model": "bert"}, r"tokenizer.ggml.model is 'bert'; implemented are gpt2, llama"),
  "no model": ({"model": None}, "tokenizer.ggml.model is None"),
  "pre": (
    {"model": "gpt2", "pre": "chameleon", "merges": ()},
    "tokenizer.ggml.pre is 'chameleon'; implemented are def",
  ),
  "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
  "doubled": ({"tokens": ("a",) * COUNT}, f"tokenizer.ggml.tokens holds 'a' {COUNT} times"),
  "types": ({"token_type": None}, "tokenizer.ggml.token_type is missing"),
  "scores": ({"scores": np.zeros(3)}, f"tokenizer.ggml.scores is not a list of {COUNT} numbers"),
  "merges": (
    {"model": "gpt2", "merges": ("a zz",)},
    "merges holds 'a zz', but its parts or their concatenation are not tokens",
  ),
  "merge": ({"model": "gpt2", "merges": ("ab",)}, "merges holds 'ab'"),
  "id": ({"bos_token_id": COUNT}, f"bos_token_id is {COUNT}, expected a token id below {COUNT}"),
  "flag": ({"add_bos_token": 1}, "add_bos_token is 1, expected true or false"),
  "spaces": ({"add_space_prefix": True}, "user-defined tokens that hold spaces is not implemented"),
}


@pytest.mark.parametrize(("keys", "message"), WRONG.values(), ids=WRONG)
def test_wrong_metadata(keys, message):
  with pytest.raises(CheckpointError, match=message):
    from_metadata(metadata(VOCABULARY, **keys))
