"""One of several processes under `jax.distributed`: loads a checkpoint and reports what it read and holds."""

import json
import sys

import jax
import numpy as np


def main(task: dict) -> dict:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", task["devices"])
  jax.distributed.initialize(
    f"127.0.0.1:{task['port']}", num_processes=task["processes"], process_id=task["process"]
  )
  from models_automodel import AutoModel
  from models_core.digest import digest
  from models_core.formats import RangeFiles
  from models_core.loading import load

  shape, names = task["mesh"]
  mesh = jax.make_mesh(shape, names)
  if task["auto"]:
    mesh = jax.sharding.Mesh(mesh.devices, names)
  if task["cache"]:
    return _load_twice(task, mesh)
  counts: list[int] = []
  try:
    plan = AutoModel.plan(task["path"], mesh)
    if not isinstance(plan.checkpoint.files, RangeFiles):
      plan.checkpoint.files.fetch(plan.files)
    model = load(plan, on_bytes=counts.append)
  except Exception as error:
    return {"error": type(error).__name__, "message": str(error)}
  held = {}
  wrong = []
  for planned in plan.parameters:
    name = planned.parameter.name
    array = _get(model, name)
    whole = _from_files(plan, planned) if task["verify"] else None
    assert array.sharding == planned.parameter.sharding
    for shard in array.addressable_shards:
      held[name, str(shard.index)] = shard.data.nbytes
      if whole is not None and np.asarray(shard.data).tobytes() != whole[shard.index].tobytes():
        wrong.append(f"{name}{shard.index}")
  return {
    "read": sum(counts),
    "held": sum(held.values()),
    "stored": plan.stored_nbytes,
    "wrong": wrong,
    "files": plan.files_of_process,
    "logits": _call(model, mesh) if task["call"] else None,
    "digest": str(digest(model)) if task["call"] else None,
    "merged": str(_merge(model, task)) if task["merge"] else None,
    "handed": _hand_over(model, plan, mesh) if task["hand"] else None,
  }


def _load_twice(task, mesh):
  """Loads through a cache, twice; then once more, after one process has lost its entry."""
  import pathlib
  import shutil

  from jax.experimental import multihost_utils

  from models_automodel import AutoModel, automodel
  from models_core.digest import digest

  counts, digests, read = [0], [], automodel.load_arrays

  def counted(plan, **options):
    counts[-1] += 1
    return read(plan, **options)

  automodel.load_arrays = counted
  cache = pathlib.Path(task["cache"], str(task["process"]))
  for _ in range(3):
    model, _ = AutoModel.from_pretrained(task["path"], mesh, dtype="float32", cache_dir=cache, progress=False)
    digests.append(str(digest(model)))
    counts.append(0)
    if len(digests) == 2 and task["process"] == 1:
      shutil.rmtree(cache)
    multihost_utils.sync_global_devices(f"loaded {len(digests)}")
  held = sum(file.stat().st_size for file in cache.glob("*/shards.safetensors"))
  return {"counts": counts[:-1], "digests": digests, "held": held}


def _call(model, mesh):
  """A number that stands for the logits of a few tokens."""
  tokens = positions = np.arange(8, dtype=np.int32)[None]
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  logits = jax.jit(lambda m: m(tokens, positions)[0], out_shardings=everywhere)(model)
  return float(np.abs(np.asarray(logits.addressable_data(0))).sum())


def _merge(model, task):
  """Writes the model with an adapter merged into it. Returns the digest of the same in memory."""
  from models_core.adapters import merge_lora
  from models_core.digest import digest
  from models_llama.llama3 import FAMILY
  from models_llama.llama3.params import save_lora_merged_model_as_safetensors

  add_factors(model)
  save_lora_merged_model_as_safetensors(task["path"], task["merge"], model, 2, 3.0)
  return digest(merge_lora(model, FAMILY, alpha=3.0))


def _hand_over(model, plan, mesh):
  """Digests of a model that got the weights as arrays on the devices, and as arrays in the memory of each process."""
  from models_automodel import from_checkpoint, lazy_checkpoint
  from models_core.digest import digest
  from models_core.dummy_model_creator import create_dummy_model

  digests = []
  on_host = {
    piece.tensor: np.frombuffer(
      plan.checkpoint.files.read(info.file, info.start, info.stop), info.dtype
    ).reshape(info.shape)
    for planned in plan.parameters
    for piece in planned.pieces
    for info in [plan.checkpoint.tensors[piece.tensor]]
  }
  for seed, arrays in enumerate((lazy_checkpoint(model), on_host)):
    other = create_dummy_model(type(model), model.config, mesh, dtype="bfloat16", random_seed=seed)
    from_checkpoint(other, arrays)
    digests.append(str(digest(other)))
  return digests


def add_factors(model):
  """LoRA factors of the query heads, split as those are."""
  from flax import nnx

  rng = np.random.default_rng(0)
  for layer in model.layers:
    q = layer.attn.q_proj
    sharding = q.w.get_value().sharding
    n, d = q.w.get_value().shape
    for name, shape, axes in (("a", (d, 2), (1,)), ("b", (2, n), (None, 0))):
      values = rng.normal(size=shape).astype(np.float32)
      if isinstance(sharding, jax.sharding.NamedSharding):
        spec = [None if axis is None else (*sharding.spec, None, None)[axis] for axis in axes]
        place = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
        values = jax.make_array_from_callback(shape, place, values.__getitem__)
      setattr(q, f"w_lora_{name}", nnx.LoRAParam(jax.numpy.asarray(values)))


def _from_files(plan, planned):
  """A parameter's elements, read one tensor after the other."""
  from models_core.weights import arrange, part_shape

  files, shape = plan.checkpoint.files, planned.parameter.shape
  whole = np.empty(shape, planned.dtype)
  for piece in planned.pieces:
    info = plan.checkpoint.tensors[piece.tensor]
    data = np.frombuffer(files.read(info.file, info.start, info.stop), info.dtype)
    whole[piece.target] = arrange(data, piece, part_shape(piece, shape))
  return whole


def _get(model, name):
  for part in name.split("."):
    model = model[int(part)] if part.isdigit() else getattr(model, part)
  return model[...]


if __name__ == "__main__":
  print(json.dumps(main(json.loads(sys.argv[1]))))
