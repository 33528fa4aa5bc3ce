"""Where a checkpoint lies, as one value that is passed from call to call."""

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
  """Names of the sources."""

  HUGGINGFACE = "huggingface"
  KAGGLE = "kaggle"
  GCS = "gcs"
  S3 = "s3"
  INTERNAL = "internal"
  LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Where:
  """Where a checkpoint lies, and how its source is asked for the files.

  Attributes:
    model_id: a repository id on the hub, a Kaggle handle, an address in an object store, or a local path.
    source: name of the source: a value of ModelSource, or a source that another package announces.
    path: a local path, or an address in the source, to load instead of `model_id`.
    revision: branch, tag or commit.
    token: the user's token for the source.
    download_path: directory that downloads are kept in.
    progress: whether downloads show progress bars on a terminal.
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
    """Makes a Where of arguments of `AutoModel.from_pretrained`. A `pathlib.Path` is always local."""
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
    """Asks the source for the files and pins their version.

    Raises:
      ModelNameError: if no Kaggle handle is known for the model.
      models_sources.SourceError: if the source cannot provide the files.
    """
    source, place = self.source, self.path or self.model_id
    if (named := models_sources.source_of_address(place)) is not None:
      source = named
    elif source == ModelSource.KAGGLE.value and self.path is None:
      with name_errors():
        place = models_naming.kaggle_handle(self.model_id)
    elif not os.path.exists(os.path.expanduser(place)):
      # A save that was killed between two renames may have left the directory under a temporary name.
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
