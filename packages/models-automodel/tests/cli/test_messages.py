import os
import subprocess
import sys

import pytest

from models_automodel.cli import main
from models_automodel.cli.messages import spoken


@pytest.mark.parametrize(
  ("message", "said"),
  [
    (
      "If they do not, pass ignore_config_keys=['a', 'b.c'] to AutoModel, or remove them",
      "If they do not, pass --ignore-config-key a --ignore-config-key b.c, or remove them",
    ),
    ("put the config.json beside it, or pass config=", "put the config.json beside it"),
    ("give another path, or overwrite=True to replace it", "give another path, or --overwrite to replace it"),
    ("choose one with file=, such as file='a.json'", "choose one with --file, such as --file a.json"),
    ("subfolder= chooses one", "--subfolder chooses one"),
    ("rope_scaling.factor=8.0 is read", "rope_scaling.factor=8.0 is read"),
  ],
)
def test_messages_speak_the_commands_options(message, said):
  assert spoken(message) == said


def test_a_refused_key_names_the_option(checkpoint, tmp_path, capsys):
  import json

  directory, _ = checkpoint
  raw = json.loads((directory / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(raw | {"residual_multiplier": 2.0}))
  (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
  assert main(["plan", str(tmp_path)]) == 1
  assert "pass --ignore-config-key residual_multiplier, or remove them" in capsys.readouterr().err
  assert main(["plan", str(tmp_path), "--ignore-config-key", "residual_multiplier"]) == 0


def test_a_target_that_is_taken_names_the_option(directory, tmp_path, capsys):
  (tmp_path / "file").touch()
  assert main(["convert", directory, str(tmp_path)]) == 1
  assert "or --overwrite to replace it" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "show", "digest", "generate", "chat", "verify", "convert"])
@pytest.mark.parametrize("path", ["/no/such/place", "./no-such", "~/no-such", "no-such/"])
def test_a_path_that_does_not_exist_is_said_first(command, path, tmp_path, capsys):
  assert main([command, path, *([str(tmp_path / "new")] if command == "convert" else [])]) == 1
  assert capsys.readouterr().err.startswith(f"automodel {command}: there is no file or directory ")


def test_a_published_name_stands_for_its_repository(hub, capsys):
  assert main(["plan", "Llama-3.1-8b:Q8_0"]) == 1
  err = capsys.readouterr().err
  assert err.startswith("Llama-3.1-8b is meta-llama/Llama-3.1-8B\n")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["plan", "x", "--dtype", "flaot32"], "did you mean float32?"),
    (["convert", "x", "y", "--to", "orbx"], "did you mean orbax?"),
    (["generate", "x", "y", "--max-new-tokens", "-3"], "'-3' is not a number of tokens"),
  ],
)
def test_a_wrong_value_is_refused_at_once(arguments, message, capsys):
  with pytest.raises(SystemExit, match="2"):
    main(arguments)
  assert message in capsys.readouterr().err


def test_what_has_no_effect_is_said_once(directory, capsys):
  arguments = ["generate", directory, "up", "--max-new-tokens", "2", "--dtype", "float32"]
  assert main([*arguments, "--temperature", "0", "--top-k", "5", "--min-p", "0.1"]) == 0
  said = "--top-k, --min-p: no effect at temperature 0, which always takes the most likely token\n"
  assert capsys.readouterr().err == said


def test_what_xla_cannot_allocate_is_one_line(directory, capsys):
  arguments = ["generate", directory, "up down", "--max-new-tokens", "20000000000", "--dtype", "float32"]
  assert main([*arguments, "--no-memory-check"]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(
    "automodel generate: not enough memory: Out of memory allocating 640000008192 bytes; "
  )
  assert main(arguments) == 1
  assert "need 2533.20 GiB of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "platforms"), [("generate", "cuda"), ("env", "tpu,nonsense")])
def test_a_backend_that_is_not_there(directory, command, platforms):
  """JAX knows cuda and asserts that it is there; it knows no backend of the name nonsense."""
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "models_automodel",
      command,
      *([directory, "up"] if command == "generate" else []),
    ],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": platforms},
  )
  assert done.returncode == (command == "generate")
  assert "Traceback" not in done.stderr
  said = done.stdout if command == "env" else done.stderr
  assert f"{platforms} is not available here" in said
  assert "set JAX_PLATFORMS=cpu" in said
