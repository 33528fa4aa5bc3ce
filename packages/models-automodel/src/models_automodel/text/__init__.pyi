from .generation import generate
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
  "Tokenizer",
  "generate",
  "load_tokenizer",
]
