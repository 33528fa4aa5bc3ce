"""What models are made of: attention, the KV cache, projections, norms, experts, RoPE, and the causal language model.

Layers know no file and no checkpoint. May import: the ground modules and `errors`.
"""

import lazy_loader

# Names and their modules stand in __init__.pyi; each module is imported when a name of it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
