"""A small checkpoint, as bytes."""

import hashlib
import struct

REPO = "org/name"
HEADER = b'{"w":{"dtype":"U8","shape":[300000],"data_offsets":[0,300000]}}'
WEIGHTS = (
  struct.pack("<Q", len(HEADER)) + HEADER + b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(9375))
)
CONFIG = b'{"model_type": "llama"}'
FILES = {
  "config.json": CONFIG,
  "model.safetensors": WEIGHTS,
  "pytorch_model.bin": WEIGHTS[::-1],
  "original/params.json": b"{}",
}


def flipped(data: bytes) -> bytes:
  """The bytes with one bit changed, far behind any header."""
  place = len(data) * 2 // 3
  return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
