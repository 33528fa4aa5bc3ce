"""A model that takes and gives texts, from one call."""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from models_automodel.automodel import Prepared, as_where, prepare
from models_automodel.progress import StatusLine
from models_automodel.text import TextModel, TextSettings
from models_automodel.where import Where
from models_core.loading import LoadPlan


def load_text_model(
  model_id: str | os.PathLike | Where,
  mesh: Mesh | None = None,
  *,
  before_weights: Callable[[LoadPlan, TextSettings], Any] | None = None,
  first_call: Callable[[TextSettings], Mapping[str, Any]] | None = None,
  **kwargs: Any,
) -> TextModel:
  """Loads a pretrained model with its tokenizer, for texts and conversations.

  Args:
    model_id: as `AutoModel.from_pretrained` takes it.
    mesh: as `AutoModel.from_pretrained` takes it.
    before_weights: is called when all but the weights is read, with what will be loaded and what the checkpoint says
      about texts; an error of its own ends the call before any weights are read.
    first_call: returns the arguments of the first call of `TextModel.stream`, its prompt as "prompt". What this call runs
      is compiled while the weights are read, so that it takes the time of the longer one of the two, not of both.
    **kwargs: all others of `AutoModel.from_pretrained`, but `intermediate_ckpt_dir`.

  Raises:
    CheckpointError: as `AutoModel.from_pretrained`, or if there is no tokenizer.
    MissingExtraError: if the package tokenizers is not installed: `pip install "models-automodel[generate]"`.
    ModelsError: as `AutoModel.from_pretrained`.
  """
  fields = {name: kwargs.pop(name) for name in inspect.signature(Where.of).parameters if name in kwargs}
  prepared = prepare(as_where(model_id, **fields), mesh, **kwargs)
  settings = TextSettings.read(prepared.plan.checkpoint)
  if before_weights is not None:
    before_weights(prepared.plan, settings)
  with _compiling(prepared, settings, first_call):
    model = prepared.load()
  return TextModel(model, settings)


@contextlib.contextmanager
def _compiling(
  prepared: Prepared, settings: TextSettings, first_call: Callable[[TextSettings], Mapping[str, Any]] | None
) -> Iterator[None]:
  """Compiles what a first call runs, in a thread: at the end of the block, what its first token needs is compiled."""
  if first_call is None:
    yield
    return
  arguments = dict(first_call(settings))
  prompt = arguments.pop("prompt")
  ready = threading.Event()

  def compile() -> None:
    # What fails here fails in the call itself, too, where the caller sees it.
    try:
      settings.planned(prepared.plan, prompt, **arguments).compile(on_first=ready.set)
    finally:
      ready.set()

  thread = concurrent.futures.ThreadPoolExecutor(1, "compile")
  thread.submit(compile)
  thread.shutdown(wait=False)
  yield
  if ready.is_set():
    return
  line = StatusLine()
  if prepared.progress:
    line.show("compiling ...")
  ready.wait()
  if prepared.progress:
    line.clear()
