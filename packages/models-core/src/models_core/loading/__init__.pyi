from .abstract import AbstractModel, AbstractParameter, abstract_model
from .loader import load, load_arrays
from .opened import OpenedPlan
from .plan import LoadPlan, loaded_dtype, plan_load
from .planned import PlannedParameter

__all__ = [
  "AbstractModel",
  "AbstractParameter",
  "LoadPlan",
  "OpenedPlan",
  "PlannedParameter",
  "abstract_model",
  "load",
  "load_arrays",
  "loaded_dtype",
  "plan_load",
]
