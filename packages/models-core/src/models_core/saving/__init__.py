"""From arrays on devices to a directory: the save plan, the writers, and the directory that is replaced at once.

May import: `family`, `config`, `formats`, `layers`, `weights`, the ground modules and `errors`; never `loading`.
"""

import lazy_loader

# Names and their modules stand in __init__.pyi; each module is imported when a name of it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
