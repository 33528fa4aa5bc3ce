"""Text in and out: a checkpoint's tokenizer, its chat template, and generation.

May import: `errors` of this package; no module that finds or loads a model.
"""

import lazy_loader

# Names and their modules stand in __init__.pyi; each module is imported when a name of it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
