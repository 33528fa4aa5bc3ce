from .abstract import AbstractModel, AbstractParameter, abstract_model
from .compiling import Compiling
from .loader import load, load_arrays, log_notes
from .opened import OpenedPlan
from .plan import LoadPlan, Match, loaded_dtype, match_tensors, plan_load, shorten
from .planned import PlannedParameter

__all__ = [
  "AbstractModel",
  "AbstractParameter",
  "Compiling",
  "LoadPlan",
  "Match",
  "OpenedPlan",
  "PlannedParameter",
  "abstract_model",
  "load",
  "load_arrays",
  "loaded_dtype",
  "log_notes",
  "match_tensors",
  "plan_load",
  "shorten",
]
