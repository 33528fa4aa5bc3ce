from models_core.testing import compilations

__all__ = ["compilations"]
