"""Where a checkpoint lies, as one value that is passed from call to call."""

from __future__ import annotations

import dataclasses
import enum
import os
import re

import models_naming
import models_sources
from models_automodel.errors import ModelNameError, name_errors
from models_core.formats import Files, is_part, open_folder, select
from models_core.saving import recover


class ModelSource(enum.Enum):
  """Names of the sources."""

  HUGGINGFACE = "huggingface"
  KAGGLE = "kaggle"
  GCS = "gcs"
  S3 = "s3"
  INTERNAL = "internal"
  LOCAL = "local"


# A quantisation of GGUF files, as it ends the name of a place: `org/repo:Q8_0`.
_TAGGED = re.compile(r"(?P<place>.+):(?P<quantisation>[A-Za-z0-9][\w-]*)", re.DOTALL)
# As it may end an address, whose names may have colons.
_QUANTISATION = re.compile(r"(UD-)?(I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32)", re.IGNORECASE)
_HUB = "hf://"
_ADDRESS = re.compile(
  r"hf://(models/)?(?P<repository>(?!datasets/|spaces/|buckets/)[^/@:]+/[^/@:]+)(@(?P<revision>[^/:]+))?(?P<inner>[/:].*)?"
)
# Beginnings of paths. An organisation of the hub has no such name.
_PATHS = ("/", "./", "../", "~")


@dataclasses.dataclass(frozen=True)
class _Place:
  """What a source is asked for, and what part of it is meant.

  Attributes:
    source: name of the source.
    identifier: that the source is asked for.
    model_id: that names the model.
    folder: of the checkpoint, or path of its file, within the files.
    file: name of one file.
    quantisation: of a GGUF file, as a part of its name.
    is_doubtful: whether a local path may be meant that does not exist.
  """

  source: str
  identifier: str
  model_id: str
  folder: str | None = None
  file: str | None = None
  quantisation: str | None = None
  is_doubtful: bool = False


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
    file: which of several checkpoints: the name of a file or a pattern of names, such as "*Q8_0*".
    subfolder: path of the checkpoint's folder within the place.
    variant: of the weights, as in `model.fp16.safetensors`.
  """

  model_id: str
  source: str = ModelSource.HUGGINGFACE.value
  path: str | None = None
  revision: str | None = None
  token: str | bool | None = dataclasses.field(default=None, repr=False)
  download_path: str | None = None
  progress: bool = True
  file: str | None = None
  subfolder: str | None = None
  variant: str | None = None

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
    file: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
  ) -> Where:
    """Makes a Where of arguments of `AutoModel.from_pretrained`. A `pathlib.Path` is always local.

    An address `hf://org/repo@revision/folder`, by which huggingface_hub and others name places of the hub, is taken apart.

    Raises:
      ModelNameError: if an address names no model, or another revision than `revision`.
    """
    if model_path is None and not isinstance(model_id, str):
      model_path = model_id
    name, path = os.fspath(model_id), None if model_path is None else os.fspath(model_path)
    source = model_source.value if isinstance(model_source, ModelSource) else model_source
    if (address := name if path is None else path).startswith(_HUB):
      name, revision = _of_address(address, revision)
      path, source = None, ModelSource.HUGGINGFACE.value
    return cls(
      name,
      source,
      path,
      revision,
      token,
      model_download_path,
      progress,
      file,
      subfolder,
      variant,
    )

  @property
  def name(self) -> str:
    """The model id without what chooses a part of the place: `org/repo` for `org/repo:Q8_0`.

    Raises:
      ModelNameError: if no Kaggle handle is known for the model.
      models_sources.SourceError: if a path is meant that does not exist.
    """
    return self._place().model_id

  def open_files(self) -> Files:
    """Asks the source for the files, pins their version, and chooses the folder and the checkpoint that are meant.

    Raises:
      CheckpointError: if the folder or the file does not exist, or several checkpoints are meant.
      ConfigError: if several arguments choose the weights.
      ModelNameError: if no Kaggle handle is known for the model.
      models_sources.SourceError: if the source cannot provide the files.
    """
    place = self._place()
    identifier, folder = place.identifier, self.subfolder
    if folder is not None and models_sources.source_of_address(identifier) is not None:
      # A store lists one folder at a time.
      identifier, folder = f"{identifier.rstrip('/')}/{folder.strip('/')}", None
    try:
      files: Files = models_sources.get_source(place.source).open_files(
        identifier,
        revision=self.revision,
        token=self.token,
        download_path=self.download_path,
        progress=self.progress,
      )
    except (
      models_sources.FilesNotFoundError,
      models_sources.AccessError,
      models_sources.ConnectionFailedError,
    ) as error:
      if not place.is_doubtful:
        raise
      raise type(error)(
        f"there is no file or directory {place.identifier}, and on the hub: {error}"
      ) from error
    file = place.file
    if place.folder is not None:
      if place.folder in files.names():
        file = place.folder
      else:
        files = open_folder(files, place.folder)
    if folder is not None:
      files = open_folder(files, folder)
    if None not in (file, self.file):
      return select(select(files, file=file), file=self.file)
    return select(files, file=file or self.file, variant=self.variant, quantisation=place.quantisation)

  def _place(self) -> _Place:
    place = self.path or self.model_id
    if (source := models_sources.source_of_address(place)) is not None:
      tagged = _TAGGED.fullmatch(place)
      if tagged and _QUANTISATION.fullmatch(tagged["quantisation"]):
        return self._of_path(source, tagged["place"], tagged["quantisation"])
      return self._of_path(source, place)
    if self.source == ModelSource.KAGGLE.value and self.path is None:
      with name_errors():
        return _Place(self.source, models_naming.kaggle_handle(self.model_id), self.model_id)
    if self.source not in (ModelSource.HUGGINGFACE.value, ModelSource.LOCAL.value):
      return _Place(self.source, place, self.model_id)
    if not _exists(place):
      # A save that was killed between two renames may have left the directory under a temporary name.
      recover(place)
    local = ModelSource.LOCAL.value
    if _exists(place):
      return self._of_path(local, place)
    tagged = _TAGGED.fullmatch(place)
    if tagged and _exists(tagged["place"]):
      return self._of_path(local, tagged["place"], tagged["quantisation"])
    if self.source == local or self.path is not None or _is_path(place):
      return _Place(local, place, self.model_id)
    return _of_hub(tagged["place"] if tagged else place, tagged["quantisation"] if tagged else None)

  def _of_path(self, source: str, place: str, quantisation: str | None = None) -> _Place:
    """The place of a path or an address. One file of a checkpoint stands for the folder that holds all its files."""
    folder, file = os.path.split(place)
    if not is_part(file) or os.path.isdir(os.path.expanduser(place)):
      folder, file = place, ""
    folder = folder or os.curdir
    named = folder if self.path is None else self.model_id
    return _Place(source, folder, named, file=file or None, quantisation=quantisation)


def _exists(place: str) -> bool:
  return os.path.exists(os.path.expanduser(place))


def _is_path(place: str) -> bool:
  """Whether a path is meant, which does not exist, and not a repository."""
  beyond = place.count("/") > 1 and os.path.isdir(os.path.dirname(os.path.expanduser(place)))
  ends = place.endswith("/") and "/" not in place.strip("/")
  return place.startswith(_PATHS) or place in (".", "..") or "\\" in place or beyond or ends


def _of_hub(place: str, quantisation: str | None) -> _Place:
  """The place of a repository: `org/repo`, or `org/repo/folder` and `org/repo/file` for a part of it."""
  organisation, _, rest = place.strip("/").partition("/")
  name, _, inner = rest.partition("/")
  repository = f"{organisation}/{name}" if rest else organisation
  return _Place(
    ModelSource.HUGGINGFACE.value,
    repository,
    repository,
    folder=inner.strip("/") or None,
    quantisation=quantisation,
    is_doubtful=bool(rest) and os.path.isdir(organisation),
  )


def _of_address(address: str, revision: str | None) -> tuple[str, str | None]:
  """The model id and the revision of "hf://org/repo@revision/folder".

  Raises:
    ModelNameError: if the address names no model, or another revision.
  """
  found = _ADDRESS.fullmatch(address)
  if found is None:
    raise ModelNameError(
      f"{address} names no model: write hf://org/repo, hf://org/repo@revision or hf://org/repo/folder"
    )
  if found["revision"] and revision not in (None, found["revision"]):
    raise ModelNameError(f"{address} and revision={revision!r} are two revisions: state one")
  return found["repository"] + (found["inner"] or ""), found["revision"] or revision
