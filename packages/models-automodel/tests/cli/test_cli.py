import os
import subprocess
import sys

import jax
import pytest

from models_automodel import cli
from models_automodel.cli import main


@pytest.fixture(scope="module")
def directory(checkpoint):
  """The tiny model with a tokenizer of its own."""
  tokenizers = pytest.importorskip("tokenizers")
  path, _ = checkpoint
  vocabulary = {word: i for i, word in enumerate(["[UNK]", "up", "down", "left", "right", *"abcdefgh"])}
  engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
  engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  engine.save(str(path / "tokenizer.json"))
  return str(path)


def run(*arguments, **options):
  """In a process of its own, since the command decides how many devices the CPU stands for."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", **options.pop("env", {})}
  return subprocess.run(
    [sys.executable, "-m", "models_automodel", *arguments],
    capture_output=True,
    text=True,
    env=environment,
    **options,
  )


def test_list_names_families_and_what_installs_them(capsys):
  assert main(["list"]) == 0
  out = capsys.readouterr().out
  assert "llama3p1 (llama3)\n  meta-llama/Llama-3.1-8B\n" in out
  assert main(["list", "--installed"]) == 0
  assert "not installed" not in capsys.readouterr().out


def test_show_states_config_parameters_and_memory(directory, capsys):
  assert main(["show", directory, "--context", "100"]) == 0
  out = capsys.readouterr().out
  assert "rope_theta = 10000.0" in out
  assert "2 x layers.*.mlp.gate_proj.w [24, 16]" in out
  # 2 x 64 x 16 for embedding and head, 2 x (2 x 16 + 2 x 256 + 2 x 128 + 3 x 384) in layers, 16 in the last norm
  assert "5,968 in all" in out
  assert "for one sequence of 100 tokens" in out


def test_show_takes_a_bare_name_without_asking_anybody(capsys):
  assert main(["show", "llama-3.1-8b"]) == 0
  assert "8,030,261,248 in all: 14.96 GiB in bfloat16" in capsys.readouterr().out


def test_show_sizes_the_cache_of_sliding_layers_both_ways(capsys):
  assert main(["show", "gemma-3-1b-it", "--context", "131072"]) == 0
  out = capsys.readouterr().out
  # Keys and values of one head of 256, positions and, in rings, slots: 26 layers, or 4 and 22 of 512 tokens.
  whole, ring = 26 * (131072 * (4 * 256 + 4)), 4 * 131072 * (4 * 256 + 4) + 22 * 512 * (4 * 256 + 8)
  assert f"KV cache: {whole / 2**30:.2f} GiB" in out
  assert f"  {ring / 2**30:.2f} GiB with ring=True" in out


def test_show_says_nothing_of_rings_where_no_layer_slides(directory, capsys):
  assert main(["show", directory]) == 0
  assert "ring" not in capsys.readouterr().out


def test_plan_costs_a_mesh_that_this_machine_does_not_have(directory):
  done = run("plan", directory, "--mesh", "fsdp=2,tp=4")
  assert done.returncode == 0, done.stderr
  assert "5,968 parameters" in done.stdout
  assert "8 devices" in done.stdout
  assert (
    "attn.k_proj.w, axis 0; layers.*.attn.v_proj.w, axis 0: replicated, since 2 heads are not divisible by tp=4"
    in done.stdout
  )
  assert run("plan", directory, "--mesh", "fsdp=2,tp=4", "--strict-sharding").returncode == 1


def test_generate_streams_text(directory):
  done = run("generate", directory, "up down", "--max-new-tokens", "5", "--mesh", "tp=2")
  assert done.returncode == 0, done.stderr
  again = run("generate", directory, "--max-new-tokens", "5", input="up down")
  assert again.stdout == done.stdout
  assert done.stdout.strip()


def test_an_error_is_one_message_without_a_traceback(directory, tmp_path):
  done = run("plan", str(tmp_path))
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert str(tmp_path) in done.stderr
  assert "Traceback" in run("--traceback", "plan", str(tmp_path)).stderr


class TestCompiledPrograms:
  @pytest.fixture
  def before_jax(self, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
      monkeypatch.setenv(name, "")  # so that it is restored
      monkeypatch.delenv(name)

  def test_they_are_kept_in_the_users_cache(self, before_jax, tmp_path):
    cli.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "automodel" / "compiled")
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"

  def test_the_environment_wins(self, before_jax, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    cli.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"

  def test_a_process_that_uses_jax_keeps_its_own_settings(self, before_jax, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", jax)
    cli.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
