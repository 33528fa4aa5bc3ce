"""Models on the hub: uploads of a directory, or of a model in memory."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from models_automodel.automodel import AutoModel
from models_automodel.errors import SaveError, source_errors
from models_automodel.verify import verify
from models_core.digest import digest_plan
from models_core.formats import checkpoint_entries

if TYPE_CHECKING:
  from models_core.loading import LoadPlan

CARD = "README.md"
# Endings of files that a new checkpoint replaces: what is left of an old one would be read together with it.
_OUTDATED = (".safetensors", ".safetensors.index.json")


def upload(
  directory: str | os.PathLike,
  repo_id: str,
  *,
  revision: str | None = None,
  token: str | bool | None = None,
  private: bool | None = None,
  message: str = "Upload a checkpoint",
  base_model: str | None = None,
  progress: bool = True,
) -> str:
  """Uploads a checkpoint to a repository of the hub, in one commit: readers find the old checkpoint or the new one.

  The checkpoint is verified first. A directory without a README.md gets a model card, which states the digest of the
  weights. An upload that was cut goes on when it is called again: content that the hub holds is not sent again.

  Args:
    directory: of safetensors files, as `AutoModel.save_pretrained` writes it. Files in subdirectories and hidden files
      stay here.
    repo_id: `organisation/name`; the repository is made if needed.
    revision: branch that the commit goes to; None is `main`.
    token: the user's token, with the right to write.
    private: whether a repository that is made is private; None is the default of the account.
    message: of the commit.
    base_model: repository of the model that this one came from, for the card.
    progress: whether progress bars are shown on a terminal.

  Returns:
    The full hash of the commit, which `revision=` takes.

  Raises:
    CheckpointError: the checkpoint is broken.
    ModelsError: as `AutoModel.plan`.
    SaveError: there is no directory, or the checkpoint lies in subdirectories, as an Orbax tree does.
    SourceFilesError: the hub cannot be reached, refuses the files, or the token may not write.
  """
  from models_sources.huggingface.upload import upload as send

  root = os.path.expanduser(os.fspath(directory))
  if not os.path.isdir(root) or any(os.path.isdir(os.path.join(root, n)) for n in checkpoint_entries(root)):
    raise SaveError(
      f"{root} is no directory of files that can be uploaded: write one with AutoModel.save_pretrained or `automodel convert`"
    )
  plan = verify(root)
  files: dict[str, str | os.PathLike | bytes] = {
    entry.name: entry.path for entry in os.scandir(root) if entry.is_file() and not entry.name.startswith(".")
  }
  with source_errors():
    if CARD not in files:
      files[CARD] = model_card(repo_id, plan, base_model).encode()
    return send(
      repo_id,
      files,
      outdated=_OUTDATED,
      revision=revision,
      token=token,
      private=private,
      message=message,
      progress=progress,
    )


def push_to_hub(
  model: nnx.Module,
  repo_id: str,
  *,
  base: str | os.PathLike | None = None,
  config: Any = None,
  max_shard_size: int | str = "5GB",
  dtype: Any = None,
  revision: str | None = None,
  token: str | bool | None = None,
  private: bool | None = None,
  message: str = "Upload a checkpoint",
  base_model: str | None = None,
  progress: bool = True,
) -> str:
  """Saves a model in a temporary directory, and uploads it: `AutoModel.save_pretrained`, then `upload`.

  After an upload that failed, the directory is gone. For a model that takes long to upload, call the two one by one.

  Args:
    model: a model of an installed family.
    repo_id: `organisation/name`.
    base: as for `save_pretrained`, as `config`, `max_shard_size` and `dtype` are.
    config: of the model.
    max_shard_size: bytes of tensor data in a file.
    dtype: of the written parameters.
    revision: as for `upload`, as all further arguments are.
    token: the user's token.
    private: whether a repository that is made is private.
    message: of the commit.
    base_model: for the card.
    progress: whether progress bars are shown.

  Returns:
    The full hash of the commit.

  Raises:
    ModelsError: as `save_pretrained` and `upload` raise it.
    SaveError: under several processes, which have no temporary directory in common.
  """
  if jax.process_count() > 1:
    raise SaveError(
      "push_to_hub() is for one process: call AutoModel.save_pretrained with a directory that all processes see, then "
      "upload() in one of them"
    )
  with tempfile.TemporaryDirectory(prefix="push-to-hub-") as folder:
    place = os.path.join(folder, "checkpoint")
    AutoModel.save_pretrained(
      model, place, base=base, config=config, max_shard_size=max_shard_size, dtype=dtype, progress=progress
    )
    return upload(
      place,
      repo_id,
      revision=revision,
      token=token,
      private=private,
      message=message,
      base_model=base_model,
      progress=progress,
    )


def model_card(repo_id: str, plan: LoadPlan, base_model: str | None = None) -> str:
  """The model card of a checkpoint: metadata that the hub reads, a first call, and the digest of the weights.

  Args:
    repo_id: the repository.
    plan: of the checkpoint, whose weights are read for the digest.
    base_model: repository of the model that this one came from.
  """
  metadata = ["library_name: models-automodel", "pipeline_tag: text-generation", "tags: [jax, flax]"]
  if base_model is not None:
    metadata.append(f"base_model: {base_model}")
  return f"""---
{chr(10).join(metadata)}
---

# {repo_id.partition("/")[2] or repo_id}

```python
from models_automodel import AutoModel

model, path = AutoModel.from_pretrained("{repo_id}")
```

The files are those of `transformers`, too. Digest of the weights, as `automodel digest {repo_id}` prints it:

```
{digest_plan(plan)}
```
"""
