from .gguf import gguf_table
from .layout import Piece, arrange, parse_layout, part_shape, pieces, put_back
from .table import TRAINING, Form, Ignored, Row, Tied, Values, WeightTable, matches, own_names

__all__ = [
  "TRAINING",
  "Form",
  "Ignored",
  "Piece",
  "Row",
  "Tied",
  "Values",
  "WeightTable",
  "arrange",
  "gguf_table",
  "matches",
  "own_names",
  "parse_layout",
  "part_shape",
  "pieces",
  "put_back",
]
