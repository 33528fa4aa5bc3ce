"""Pretrained models from one call: `AutoModel.from_pretrained`."""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
_import_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
  if name == "__version__":
    from importlib.metadata import version

    return version("models-automodel")
  return _import_name(name)
