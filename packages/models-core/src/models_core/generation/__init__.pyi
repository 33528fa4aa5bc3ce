from .decoding import Generated, Piece, Stream, generate, stream
from .prefixes import Prefix
from .prompts import check_prompts
from .sampling import GREEDY, Sampling
from .scoring import Scored, score
from .session import Session
from .stopping import Stop

__all__ = [
  "GREEDY",
  "Generated",
  "Piece",
  "Prefix",
  "Sampling",
  "Scored",
  "Session",
  "Stop",
  "Stream",
  "check_prompts",
  "generate",
  "score",
  "stream",
]
