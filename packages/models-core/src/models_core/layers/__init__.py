"""The building blocks of models: attention, the KV cache, projections, norms, experts, RoPE, the causal language model.

Layers know nothing of files and checkpoints. May import: the ground modules and `errors`.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
