from .gguf_files import with_tokenizer
from .text_model import Prompt, TextModel, TextSettings
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
  "Prompt",
  "TextModel",
  "TextSettings",
  "Tokenizer",
  "load_tokenizer",
  "with_tokenizer",
]
