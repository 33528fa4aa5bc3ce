from .generation import generate
from .gguf_files import with_tokenizer
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
  "Tokenizer",
  "generate",
  "load_tokenizer",
  "with_tokenizer",
]
