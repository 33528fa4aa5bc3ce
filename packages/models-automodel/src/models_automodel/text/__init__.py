"""Text in and out: a checkpoint's tokenizer, its chat template, and a model that takes and gives texts.

May import: `errors` of this package, `models_core` and `models_sources`; no module that finds or loads a model.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
