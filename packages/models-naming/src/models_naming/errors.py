"""What can be wrong with a name."""


class NamingError(ValueError):
  """A name that cannot be used; the root of this package's errors."""


class UnknownModelError(NamingError):
  """No family claims the name."""


class UnsupportedModelError(NamingError):
  """The name is recognised as another architecture, or as weights that no family reads."""


class NamingConflictError(NamingError):
  """Two fields name different models, or two packages give one prefix different meanings."""
