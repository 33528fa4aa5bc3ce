"""Where checkpoints lie: a model identifier becomes files."""
