import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from models_automodel import cli
from models_automodel.cli import main
from models_automodel.cli.compiling import working


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


def test_plan_costs_a_mesh_of_any_size_without_devices(directory, capsys):
  assert main(["plan", directory, "--mesh", "fsdp=100000"]) == 0
  assert "100000 devices, each holding" in capsys.readouterr().out


def test_json_is_one_object(directory, tmp_path, capsys):
  def found(*arguments):
    assert main([*arguments, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])

  assert "meta-llama/Llama-3.1-8B" in [m for f in found("list")["families"] for m in f["models"]]
  assert found("show", directory)["num_parameters"] == 5968
  shown = found("show", directory, "--mesh", "fsdp=2")
  assert shown["num_devices"] == 2
  assert shown["num_parameters_per_device"] == 3024  # half of all but five norms of 16, which tp would shard
  plan = found("plan", directory, "--mesh", "fsdp=2")
  assert (plan["num_parameters"], plan["devices"][0]["count"]) == (5968, 2)
  assert len(found("digest", directory)["digest"]) >= 16
  assert found("verify", directory, "--values")["checked"] == ["structure", "shapes", "numbers"]
  assert "model.safetensors" in found("convert", directory, str(tmp_path / "converted"))["files"]
  assert "jax" in found("env")["packages"]


def test_verify_and_convert_say_what_they_did(directory, tmp_path, capsys):
  assert main(["verify", directory]) == 0
  assert capsys.readouterr().out.endswith("OK: structure, shapes\n")
  assert main(["convert", directory, str(tmp_path / "new")]) == 0
  assert f"wrote {tmp_path / 'new'}: " in capsys.readouterr().out


def test_env_says_what_a_report_needs(capsys):
  assert main(["env"]) == 0
  out = capsys.readouterr().out
  assert "backend: cpu, 4 x cpu:cpu" in out
  assert "  jax: " in out


def test_generate_in_lines_of_json(directory, capsys):
  options = ["--max-new-tokens", "5", "--temperature", "0.7", "--top-k", "9", "--seed", "3"]
  assert main(["generate", directory, "up down", *options]) == 0
  text = capsys.readouterr().out
  assert main(["generate", directory, "up down", *options, "--json"]) == 0
  *pieces, numbers = map(json.loads, capsys.readouterr().out.splitlines())
  assert "".join(piece["text"] for piece in pieces) + "\n" == text
  assert numbers["new_tokens"] == 5


REFUSED = {
  "empty prompt": ([""], "the prompt is empty"),
  "stop string": (["up", "--stop", ""], "a stop string is empty"),
  "number": (["up", "--top-p", "3"], "top_p is 3.0, expected more than 0 and at most 1"),
  "system": (["up", "--system", "x"], "--system: a system message needs a chat template"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_prompt_is_refused_before_weights_are_read(
  directory, arguments, message, capsys, monkeypatch
):
  monkeypatch.setattr("models_automodel.automodel.load_arrays", None)
  assert main(["generate", directory, *arguments]) == 1
  assert message in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_before_weights_are_read(directory, capsys, monkeypatch):
  monkeypatch.setattr("models_automodel.cli.memory.free_host_bytes", lambda: 10_000)
  assert main(["generate", directory, "up", "--max-new-tokens", "5"]) == 1
  err = capsys.readouterr().err
  assert "of this machine, but 0.00 GiB are free: choose a smaller --dtype" in err
  assert main(["generate", directory, "up", "--max-new-tokens", "5", "--no-memory-check"]) == 0


def test_chat_needs_a_template(directory, capsys):
  assert main(["chat", directory]) == 1
  assert "has no chat template" in capsys.readouterr().err


@pytest.fixture
def talking(directory, tmp_path):
  """The tiny model with a chat template that repeats the conversation."""
  for name in ("config.json", "model.safetensors", "tokenizer.json"):
    (tmp_path / name).symlink_to(os.path.join(directory, name))
  template = "{% for m in messages %}{{ m.content }} {% endfor %}"
  (tmp_path / "chat_template.jinja").write_text(template)
  return str(tmp_path)


def test_chat_keeps_the_conversation(talking, capsys, monkeypatch):
  lines = iter(["/help", "up", "", "down", "/nonsense", "/clear", "up", "/exit", "never"])
  monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
  seen, sessions = [], []
  from models_automodel.cli import chat

  class Answer(chat.Answer):
    def __init__(self, model, prompt, options, session):
      seen.append([message["content"] for message in prompt])
      sessions.append(session)
      super().__init__(model, prompt, options, session)

  monkeypatch.setattr(chat, "Answer", Answer)
  assert main(["chat", talking, "--max-new-tokens", "3", "--system", "left"]) == 0
  out, err = capsys.readouterr()
  first, second, third = (line for line in out.splitlines()[4:])
  assert seen == [["left", "up"], ["left", "up", first, "down"], ["left", "up"]]
  assert third == first
  assert len({id(session) for session in sessions}) == 1
  assert second
  assert "/clear" in out
  assert "/nonsense is no command" in err


@pytest.mark.parametrize(
  ("arguments", "meant"),
  [(["lst"], "did you mean list?"), (["plan", "x", "--strict-shading"], "did you mean --strict-sharding?")],
)
def test_a_slip_is_answered_with_what_may_be_meant(arguments, meant, capsys):
  with pytest.raises(SystemExit, match="2"):
    main(arguments)
  assert meant in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="watches what the command imports")
def test_ctrl_c_is_one_line_and_status_130(directory):
  process = subprocess.Popen(
    [sys.executable, "-m", "models_automodel", "generate", directory, "up", "--max-new-tokens", "50"],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
  )
  # Somewhere between the imports and the compilation.
  maps, deadline = pathlib.Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
  while "jaxlib" not in maps.read_text() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert err.strip() == "automodel: interrupted"


def test_a_terminal_says_when_jax_compiles(monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  x = jax.numpy.arange(7)
  with working("reading ..."):
    jax.jit(lambda x: x * 3 + 1)(x)
  lines = capsys.readouterr().err.split("\r\033[K")
  assert lines == ["", "reading ...", "compiling ...", "reading ...", ""]


def test_a_terminal_says_what_takes_time(directory, monkeypatch, capsys):
  """In a process whose programs are not compiled yet, with a stderr that is a terminal."""
  jax.clear_caches()
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  assert main(["generate", directory, "up down left", "--max-new-tokens", "5", "--dtype", "float32"]) == 0
  _, err = capsys.readouterr()
  clear = "\r\033[K"
  assert f"{clear}compiling ...{clear}{clear}reading the prompt ...{clear}" in err
  *_, line = err.replace(clear, "\n").splitlines()
  assert line.startswith("\033[2m[5 tokens: ")
  assert " s to the first, then " in line
