from .gguf import gguf_table
from .layout import Piece, arrange, group_axes, head_sizes, parse_layout, part_shape, pieces, put_back
from .table import TRAINING, Conversion, Form, Ignored, Row, Tied, WeightTable, matches, own_names

__all__ = [
  "TRAINING",
  "Conversion",
  "Form",
  "Ignored",
  "Piece",
  "Row",
  "Tied",
  "WeightTable",
  "arrange",
  "gguf_table",
  "group_axes",
  "head_sizes",
  "matches",
  "own_names",
  "parse_layout",
  "part_shape",
  "pieces",
  "put_back",
]
