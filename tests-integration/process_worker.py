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
  from models_core.checkpoint import RangeFiles
  from models_core.loader import load
  from models_core.reading import files_of_process

  shape, names = task["mesh"]
  mesh = jax.make_mesh(shape, names)
  if task["auto"]:
    mesh = jax.sharding.Mesh(mesh.devices, names)
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
    "files": files_of_process(plan),
    "logits": _call(model, mesh) if task["call"] else None,
  }


def _call(model, mesh):
  """A number that stands for the logits of a few tokens."""
  tokens = positions = np.arange(8, dtype=np.int32)[None]
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  logits = jax.jit(lambda m: m(tokens, positions)[0], out_shardings=everywhere)(model)
  return float(np.abs(np.asarray(logits.addressable_data(0))).sum())


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
