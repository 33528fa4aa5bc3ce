"""`python -m models_automodel`, and the script `automodel`, are the command of `cli`."""

import sys

from models_automodel.interrupt import exit_at_interrupt


def main() -> int:
  """Runs the command. From its first moment on, Ctrl-C ends it with one line."""
  exit_at_interrupt()
  from models_automodel.cli import main as run

  return run()


if __name__ == "__main__":
  sys.exit(main())
