"""Commands that describe or check a model or a checkpoint: `list`, `show`, `plan`, `digest` and `verify`."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from models_automodel.cli.arguments import (
  Commands,
  add_ignored_keys,
  add_selectors,
  mesh_arguments,
  model_arguments,
  selectors_of,
  token_count,
  where_of,
)
from models_automodel.cli.memory import gib
from models_automodel.cli.mesh_argument import abstract_mesh, make_mesh
from models_automodel.cli.output import add_json, print_json
from models_automodel.cli.sharding_table import Split, of_memory, of_sharding, star
from models_automodel.cli.tables import columns, is_terminal, of_plan, of_show, print_renderables

if TYPE_CHECKING:
  from models_core.family import Family
  from models_core.loading import LoadPlan


def add_list(commands: Commands) -> None:
  """Adds `automodel list`."""
  parser = commands.add_parser("list", help="list the known models, by family")
  parser.set_defaults(run=_list)
  parser.add_argument("--installed", action="store_true", help="only models whose family is installed")
  add_json(parser)


def _list(options: argparse.Namespace) -> None:
  import models_naming
  from models_automodel.families import install_command_of, installed

  found = []
  for family, ids in models_naming.known_model_ids().items():
    category = models_naming.FAMILIES[
      next(p for p, f in models_naming.FAMILIES.items() if f.family == family)
    ].category
    if category in installed():
      note = category
    elif options.installed:
      continue
    else:
      note = f"{category}, not installed: {install_command_of(category)}"
    found.append(
      {"family": family, "category": category, "installed": category in installed(), "models": list(ids)}
    )
    if not options.json:
      _print_family(family, note, ids)
  for category, entry in installed().items():
    if models_naming.distribution_of(category) is None:
      package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
      found.append(
        {"family": None, "category": category, "installed": True, "package": package, "models": []}
      )
      if not options.json:
        print(f"{category} (installed by {package})")
  if options.json:
    print_json({"families": found})


def _print_family(family: str, note: str, ids: Sequence[str]) -> None:
  if is_terminal():
    print(f"\033[1m{family}\033[0m ({note})", *columns(ids), sep="\n")
  else:
    print(f"{family} ({note})", *(f"  {model_id}" for model_id in ids), sep="\n")


def add_show(commands: Commands) -> None:
  """Adds `automodel show`."""
  parser = commands.add_parser(
    "show",
    parents=[model_arguments(), mesh_arguments()],
    help="show the configuration, the parameters and the memory of a model",
  )
  parser.set_defaults(run=_show)
  parser.add_argument(
    "--sharding", action="store_true", help="draw which device of --mesh holds which part of each parameter"
  )
  parser.add_argument(
    "--context",
    type=token_count,
    default=8192,
    help="tokens in the KV cache whose memory is shown (default: 8192)",
  )
  add_json(parser)


def _show(options: argparse.Namespace) -> None:
  import jax
  from flax import nnx

  from models_core.layers import shapes_only
  from models_core.loading import abstract_model

  if options.sharding and options.mesh is None:
    raise TypeError("--sharding: which devices? add their mesh, such as --mesh fsdp=2,tp=4")
  family, config = _found(options)
  model = abstract_model(family.model_class, config, abstract_mesh(options.mesh))

  def caches() -> list[Any]:
    model = family.model_class(config, rngs=nnx.Rngs(0))
    return [model.init_cache(1, options.context, jax.numpy.bfloat16, ring=ring) for ring in (False, True)]

  with shapes_only():
    whole, ring = (
      sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
      for cache in nnx.eval_shape(caches)
    )
  fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  parameters = {name: list(parameter.shape) for name, parameter in model.parameters.items()}
  shown: dict[str, Any] = {
    "family": family.name,
    "class": f"{family.model_class.__module__}.{family.model_class.__name__}",
    "config": fields,
    "parameters": parameters,
    "num_parameters": sum(map(math.prod, parameters.values())),
    "context": options.context,
    "kv_cache_bytes": whole,
    "kv_cache_bytes_with_rings": ring,
  }
  if options.mesh is not None:
    parts = (p.sharding.shard_shape(p.shape) for p in model.parameters.values())
    devices = math.prod(options.mesh.values())
    shown |= {"num_devices": devices, "num_parameters_per_device": sum(map(math.prod, parts))}
  if options.sharding:
    shown["sharding"] = {name: Split.of(p).axes for name, p in model.parameters.items()}
  if options.json:
    print_json(shown)
    return
  shapes: dict[str, list[list[int]]] = collections.defaultdict(list)
  for name, shape in parameters.items():
    shapes[star(name)].append(shape)
  if is_terminal():
    print_renderables(of_show(shown, shapes))
  else:
    _print_shown(shown, shapes)
  if options.sharding:
    print_renderables(of_sharding(model.parameters.values()))


def _print_shown(shown: dict[str, Any], shapes: dict[str, list[list[int]]]) -> None:
  print(f"{shown['family']}: {shown['class']}")
  for name, value in shown["config"].items():
    print(f"  {name} = {value}")
  print("parameters:")
  for name, same in shapes.items():
    print(f"  {len(same):4} x {name} {' or '.join(map(str, sorted({tuple(s): s for s in same}.values())))}")
  total, whole, ring = shown["num_parameters"], shown["kv_cache_bytes"], shown["kv_cache_bytes_with_rings"]
  print(f"  {total:,} in all: {gib(2 * total)} in bfloat16, {gib(4 * total)} in float32")
  if "num_devices" in shown:
    devices, part = shown["num_devices"], shown["num_parameters_per_device"]
    print(
      f"  {part:,} on each of {devices} device{'s' * (devices != 1)}: {gib(2 * part)} in bfloat16, {gib(4 * part)} in float32"
    )
  print(f"KV cache: {gib(whole)} for one sequence of {shown['context']:,} tokens in bfloat16")
  if ring < whole:
    print(f"  {gib(ring)} with ring=True: layers with a sliding window keep only the tokens in the window")


def _found(options: argparse.Namespace) -> tuple[Family, Any]:
  """The family and the configuration of the model; for a bare name without any request to a source."""
  import models_naming
  from models_automodel.families import load_family
  from models_automodel.finding import find
  from models_automodel.presets import call_model_config

  if "/" in options.model or os.path.exists(os.path.expanduser(options.model)):
    found = find(where_of(options), ignore_config_keys=options.ignore_config_key)
    return found.family, found.config
  config = call_model_config(options.model)
  return load_family(models_naming.get_model_config_category(options.model), options.model), config


def add_plan(commands: Commands) -> None:
  """Adds `automodel plan`."""
  parser = commands.add_parser(
    "plan",
    parents=[model_arguments(), mesh_arguments()],
    help="show what loading would do; reads only the configuration and the headers",
  )
  parser.set_defaults(run=_plan)
  parser.add_argument(
    "--strict-sharding",
    action="store_true",
    help="fail if the mesh cannot shard an axis (default: replicate the axis)",
  )
  parser.add_argument(
    "--plot",
    action="store_true",
    help="draw what the memory of a device holds, and which device holds which part of each parameter",
  )
  add_json(parser)


def _plan(options: argparse.Namespace) -> None:
  from models_automodel.automodel import AutoModel

  plan = AutoModel.plan(
    where_of(options),
    abstract_mesh(options.mesh),
    dtype=options.dtype,
    ignore_config_keys=options.ignore_config_key,
    strict_sharding=options.strict_sharding,
  )
  if options.json:
    print_json(_planned(plan))
    return
  if is_terminal():
    print_renderables(of_plan(plan))
  else:
    print(plan)
  if options.plot:
    print_renderables(of_memory({p.parameter.name: p.shard_nbytes for p in plan.parameters}))
    print_renderables(of_sharding(p.parameter for p in plan.parameters))


def _planned(plan: LoadPlan) -> dict[str, Any]:
  """What a plan says, for JSON."""
  return {
    "path": plan.checkpoint.files.path,
    "files": list(plan.files),
    "num_parameters": plan.num_parameters,
    "stored_bytes": plan.stored_nbytes,
    "devices": [{"count": count, "bytes_each": nbytes} for nbytes, count in plan.shares().items()],
    "casts": [{"stored": a, "loaded": b, "tensors": n} for (a, b), n in plan.casts().items()],
    "notes": plan.notes(),
  }


def add_digest(commands: Commands) -> None:
  """Adds `automodel digest`."""
  parser = commands.add_parser(
    "digest",
    parents=[model_arguments(), mesh_arguments()],
    help="print a number for the weights: equal bits give equal numbers on every mesh",
  )
  parser.set_defaults(run=_digest)
  parser.add_argument("--parameters", action="store_true", help="also print a number for each parameter")
  add_json(parser)


def _digest(options: argparse.Namespace) -> None:
  from models_automodel.digest import digest

  found = digest(
    where_of(options),
    mesh=make_mesh(options.mesh),
    dtype=options.dtype,
    ignore_config_keys=options.ignore_config_key,
  )
  if options.json:
    numbers = {name: f"{number:016x}" for name, number in found.parameters.items()}
    print_json({"digest": str(found)} | ({"parameters": numbers} if options.parameters else {}))
    return
  if options.parameters:
    for name, number in found.parameters.items():
      print(f"{number:016x}  {name}")
  print(found)


def add_verify(commands: Commands) -> None:
  """Adds `automodel verify`."""
  parser = commands.add_parser(
    "verify", help="check the structure, shapes and bytes of a checkpoint on this machine"
  )
  parser.set_defaults(run=_verify)
  parser.add_argument("directory", help="directory of the checkpoint, or a GGUF file")
  add_selectors(parser)
  add_ignored_keys(parser)
  parser.add_argument(
    "--values", action="store_true", help="also read all weights, and fail on NaN or infinity"
  )
  parser.add_argument(
    "--sha256", action="store_true", help="print the checksum of every file, as sha256sum does"
  )
  parser.add_argument(
    "--checksums", metavar="FILE", help="compare the files with a list that --sha256 printed"
  )
  parser.add_argument(
    "--hub",
    metavar="REPOSITORY",
    help="compare the files with the hashes that the hub states for a repository",
  )
  parser.add_argument("--revision", help="branch, tag or commit of the repository (default: main)")
  add_json(parser)


def _verify(options: argparse.Namespace) -> None:
  from models_automodel.verify import check_checksums, check_hub, checksums, read_checksums, verify

  plan = verify(
    options.directory,
    values=options.values,
    ignore_config_keys=options.ignore_config_key,
    **selectors_of(options),
  )
  if options.checksums:
    check_checksums(options.directory, read_checksums(options.checksums))
  commit = check_hub(options.directory, options.hub, revision=options.revision) if options.hub else None
  sums = checksums(options.directory) if options.sha256 else {}
  if commit is not None and not options.json:
    print(f"all files are those of {options.hub} at commit {commit}")
  checked = ["structure", "shapes"]
  checked += ["numbers"] * options.values + ["checksums"] * bool(options.checksums)
  checked += [f"files of {options.hub} at commit {commit}"] * (commit is not None)
  if options.json:
    print_json(_planned(plan) | {"ok": True, "checked": checked} | ({"sha256": sums} if sums else {}))
  elif options.sha256:
    for name, digest in sums.items():
      print(f"{digest}  {name}")
  elif is_terminal():
    print_renderables([*of_plan(plan), f"[bold green]OK[/bold green]: {', '.join(checked)}"])
  else:
    print(plan)
    print(f"OK: {', '.join(checked)}")
