"""Which modules of a model an adapter of peft changes: the rules of `target_modules` and its companions."""

from __future__ import annotations

import dataclasses
import functools
import re

ALL_LINEAR = "all-linear"
# What peft sets for an adapter that has no factors.
NO_MODULES = "dummy-target-modules"
# What peft takes if target_modules is missing, for all architectures that are implemented here.
_DEFAULT = ("q_proj", "v_proj")
# The number of the layer in the name of a module: the first one.
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Targets:
  """The keys of adapter_config.json that choose modules.

  Attributes:
    modules: ends of names, or one regular expression for whole names, or "all-linear"; None is peft's default.
    excluded: the same for modules that are left out.
    layers: numbers of the layers; None is all.
    layers_pattern: names of the list of layers; empty is any.
    saved: names of modules that are stored whole, which have no factors.
    parameters: ends of the names of parameters that hold several matrices.
  """

  modules: tuple[str, ...] | str | None = None
  excluded: tuple[str, ...] | str | None = None
  layers: tuple[int, ...] | None = None
  layers_pattern: tuple[str, ...] = ()
  saved: tuple[str, ...] = ()
  parameters: tuple[str, ...] = ()

  @property
  def all_linear(self) -> bool:
    """Whether all linear layers but the head are meant."""
    return isinstance(self.modules, str) and self.modules.lower() == ALL_LINEAR

  @property
  def stated(self) -> str:
    """The modules as text, for messages."""
    parameters = f"target_parameters={list(self.parameters)}"
    if self.modules is None and self.parameters:
      return parameters
    modules = self.modules if isinstance(self.modules, str) else list(self.modules or _DEFAULT)
    return f"target_modules={modules}" + (f", {parameters}" if self.parameters else "")

  def has_module(self, name: str, *, is_embedding: bool, is_head: bool) -> bool:
    """Whether a module with a matrix has factors.

    Args:
      name: of the module in transformers' model.
      is_embedding: whether it is the embedding.
      is_head: whether it is the head, which "all-linear" leaves out.
    """
    if self._is_left_out(name):
      return False
    modules = self.modules
    if modules is None:
      if self.parameters:
        return False
      modules = _DEFAULT
    if isinstance(modules, str):
      if self.all_linear:
        return not is_embedding and not is_head
      return modules != NO_MODULES and re.fullmatch(modules, name) is not None
    if name in modules:
      return True
    if not any(name.endswith(f".{end}") for end in modules):
      return False
    return self.layers is None or self._layer_of(name) in self.layers

  def has_parameter(self, name: str) -> bool:
    """Whether a parameter with several matrices has factors."""
    return any(name == end or name.endswith(f".{end}") for end in self.parameters)

  def _is_left_out(self, name: str) -> bool:
    if isinstance(self.excluded, str):
      if self.excluded and re.fullmatch(self.excluded, name):
        return True
    elif self.excluded and any(name == end or name.endswith(f".{end}") for end in self.excluded):
      return True
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.saved)

  def _layer_of(self, name: str) -> int | None:
    if not self.layers_pattern:
      found = _LAYER.match(name)
      return None if found is None else int(found[1])
    for pattern in self.layers_pattern:
      if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", name):
        return int(found["layer"])
    return None


@functools.lru_cache(1024)
def module_pattern(key: str) -> re.Pattern[str]:
  """The regular expression of a key of rank_pattern or alpha_pattern, which stands for ends of modules' names."""
  return re.compile(rf"(.*\.)?({key})$")
