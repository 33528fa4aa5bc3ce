"""The errors of this package."""


class NamingError(ValueError):
  """A name that cannot be used. Root of this package's errors."""


class UnknownModelError(NamingError):
  """No family claims the name."""


class UnsupportedModelError(NamingError):
  """The name belongs to an architecture that no family implements, or to quantised weights."""


class NamingConflictError(NamingError):
  """Two fields name different models, or two packages announce one prefix with different meanings."""
