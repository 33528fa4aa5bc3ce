"""`python -m models_automodel` is the `automodel` command."""

import sys

from models_automodel.cli import main

sys.exit(main())
