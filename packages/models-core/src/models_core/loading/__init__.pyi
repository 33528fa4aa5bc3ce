from .abstract import AbstractModel, AbstractParameter, abstract_model
from .loader import OpenedPlan, load, load_arrays
from .plan import LoadPlan, PlannedParameter, loaded_dtype, plan_load
from .process_split import files_of_process

__all__ = [
  "AbstractModel",
  "AbstractParameter",
  "LoadPlan",
  "OpenedPlan",
  "PlannedParameter",
  "abstract_model",
  "files_of_process",
  "load",
  "load_arrays",
  "loaded_dtype",
  "plan_load",
]
