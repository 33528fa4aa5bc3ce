"""Saving, from arrays on devices to a directory or a target: the save plan, the writers, and the atomic commit.

May import: `family`, `config`, `formats`, `layers`, `weights`, the ground modules and `errors`, but not `loading`.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
