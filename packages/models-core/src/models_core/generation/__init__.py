"""Generation and scoring: from token ids to token ids and log-probabilities, in batches, on any mesh.

Prompts run through the model in chunks of few lengths, and new tokens come from a loop on the device, so that few
programs are compiled and the host waits for no single token. Strings stay outside. All prompts of a call run together
from start to end: to serve requests that come and go, with paged caches, is the work of engines such as vLLM.

May import: `layers`, the ground modules and `errors`.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
