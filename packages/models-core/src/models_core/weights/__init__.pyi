from .gguf import gguf_table
from .layout import Piece, arrange, group_axes, letter_sizes, parse_layout, part_shape, pieces, put_back
from .maxtext import divided_by_root_of_head_dim, maxtext_table
from .table import BASE, TRAINING, Conversion, Form, Ignored, Row, Tied, WeightTable, matches, own_names
from .tunix import tunix_table

__all__ = [
  "BASE",
  "TRAINING",
  "Conversion",
  "Form",
  "Ignored",
  "Piece",
  "Row",
  "Tied",
  "WeightTable",
  "arrange",
  "divided_by_root_of_head_dim",
  "gguf_table",
  "group_axes",
  "letter_sizes",
  "matches",
  "maxtext_table",
  "own_names",
  "parse_layout",
  "part_shape",
  "pieces",
  "put_back",
  "tunix_table",
]
