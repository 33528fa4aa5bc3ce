"""Where a checkpoint lies, as one value that all calls pass on."""

from __future__ import annotations

import dataclasses
import enum
import os

import models_naming
import models_sources
from models_automodel.errors import name_errors
from models_core.formats import Files
from models_core.saving import recover


class ModelSource(enum.Enum):
  """Where a checkpoint lies."""

  HUGGINGFACE = "huggingface"
  KAGGLE = "kaggle"
  GCS = "gcs"
  S3 = "s3"
  INTERNAL = "internal"
  LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Where:
  """Where a checkpoint lies, and how its source is asked for it.

  Attributes:
    model_id: of the hub, a Kaggle handle, an address of an object store, or a local path.
    source: the name of the source, one of ModelSource or one that another package announces.
    path: a local path or an address of the source, to load instead.
    revision: branch, tag or commit.
    token: of the source.
    download_path: the source's cache directory.
    progress: whether downloads show bars on a terminal.
  """

  model_id: str
  source: str = ModelSource.HUGGINGFACE.value
  path: str | None = None
  revision: str | None = None
  token: str | bool | None = dataclasses.field(default=None, repr=False)
  download_path: str | None = None
  progress: bool = True

  @classmethod
  def of(
    cls,
    model_id: str | os.PathLike,
    *,
    model_source: ModelSource | str = ModelSource.HUGGINGFACE,
    model_path: str | os.PathLike | None = None,
    model_download_path: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
  ) -> Where:
    """What the arguments of `AutoModel.from_pretrained` say. A path that is no string is local."""
    if model_path is None and not isinstance(model_id, str):
      model_path = model_id
    return cls(
      os.fspath(model_id),
      model_source.value if isinstance(model_source, ModelSource) else model_source,
      None if model_path is None else os.fspath(model_path),
      revision,
      token,
      model_download_path,
      progress,
    )

  def open_files(self) -> Files:
    """The files, at one version.

    Raises:
      ModelNameError: for a model that Kaggle does not have.
      SourceError: if the source does not give them.
    """
    source, place = self.source, self.path or self.model_id
    if (named := models_sources.source_of_address(place)) is not None:
      source = named
    elif source == ModelSource.KAGGLE.value and self.path is None:
      with name_errors():
        place = models_naming.kaggle_handle(self.model_id)
    elif not os.path.exists(os.path.expanduser(place)):
      # A saver that was killed may have left a directory between two renames.
      recover(place)
    if source == ModelSource.HUGGINGFACE.value and (
      self.path is not None or os.path.exists(os.path.expanduser(place))
    ):
      source = ModelSource.LOCAL.value
    return models_sources.get_source(source).open_files(
      place,
      revision=self.revision,
      token=self.token,
      download_path=self.download_path,
      progress=self.progress,
    )
