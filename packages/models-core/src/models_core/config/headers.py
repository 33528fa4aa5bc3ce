"""The formats whose headers include the model's configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models_core.config.gguf import gguf_config
from models_core.formats import GGUF, Checkpoint

# Name of the format -> a function that gives a checkpoint's configuration, in the keys of config.json.
HEADER_CONFIGS: Mapping[str, Callable[[Checkpoint], Mapping[str, Any]]] = {GGUF.name: gguf_config}
