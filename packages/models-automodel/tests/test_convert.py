"""`automodel convert` and `automodel verify`."""

import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models_automodel import CheckpointError, ConfigError, SaveError, SourceFilesError
from models_automodel.cli import main
from models_automodel.convert import convert
from models_automodel.verify import verify
from models_core.loading.opened import OpenedPlan
from models_sources import ConnectionFailedError
from models_sources.local import LocalFiles


def tensors_of(directory):
  found = {}
  for file in directory.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(file)
  return found


@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_converting_keeps_every_byte(checkpoint, size, tmp_path):
  source, tensors = checkpoint
  assert main(["convert", str(source), str(tmp_path / "out"), "--max-shard-size", size]) == 0
  found = tensors_of(tmp_path / "out")
  assert found.keys() == tensors.keys()
  assert all(found[name].tobytes() == tensors[name].tobytes() for name in tensors)
  assert (tmp_path / "out" / "model.safetensors").exists() == (size == "5GB")
  assert main(["verify", str(tmp_path / "out"), "--values"]) == 0


def test_converting_to_another_dtype(checkpoint, tmp_path, capsys):
  source, tensors = checkpoint
  assert main(["convert", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
  for name, array in tensors_of(tmp_path / "out").items():
    assert array.tobytes() == tensors[name].astype(ml_dtypes.bfloat16).tobytes()
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
  assert main(["convert", str(source), str(tmp_path / "out")]) == 1
  assert "overwrite" in capsys.readouterr().err
  assert main(["convert", str(source), str(tmp_path / "out"), "--overwrite"]) == 0
  assert tensors_of(tmp_path / "out").keys() == tensors.keys()
  assert {array.dtype for array in tensors_of(tmp_path / "out").values()} == {np.dtype(np.float32)}


def test_one_parameter_is_read_at_a_time(checkpoint, tmp_path, monkeypatch):
  asked = []
  read_all = OpenedPlan.read_all

  def counted(opened, names=None):
    asked.append(list(names))
    return read_all(opened, asked[-1])

  monkeypatch.setattr(OpenedPlan, "read_all", counted)
  convert(str(checkpoint[0]), tmp_path / "out", progress=False)
  assert all(len(names) == 1 for names in asked)
  assert len(asked) == len(checkpoint[1])


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_a_failure_of_the_source_is_not_one_of_the_target(to, checkpoint, tmp_path, monkeypatch):
  def fail(files, names):
    raise ConnectionFailedError("the hub does not answer (503): try again later")

  monkeypatch.setattr(LocalFiles, "fetch", fail)
  with pytest.raises(SourceFilesError, match=r"^the hub does not answer"):
    convert(str(checkpoint[0]), tmp_path / "out", to=to, progress=False)
  assert not (tmp_path / "out").exists()


def test_an_unknown_naming_scheme_is_an_error(checkpoint, tmp_path):
  with pytest.raises(
    ConfigError, match="the naming scheme 'onnx' cannot be written: choose one of huggingface"
  ):
    convert(str(checkpoint[0]), tmp_path / "out", to="onnx")
  with pytest.raises(SaveError):
    convert(str(checkpoint[0]), checkpoint[0], progress=False)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_verify_finds_numbers_that_are_none(checkpoint, number, edit_config, capsys):
  directory, tensors = edit_config(), dict(checkpoint[1])
  broken = tensors["model.norm.weight"].copy()
  broken[3] = number
  safetensors.numpy.save_file(tensors | {"model.norm.weight": broken}, directory / "model.safetensors")
  verify(directory)
  with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 1 of 16 numbers"):
    verify(directory, values=True)
  assert main(["verify", str(directory), "--values"]) == 1
  assert "NaN or infinite" in capsys.readouterr().err


def test_verify_finds_what_does_not_fit_config_json(edit_config):
  with pytest.raises(CheckpointError, match="has shape"):
    verify(edit_config(intermediate_size=25))


def test_verify_compares_checksums(edit_config, tmp_path, capsys):
  directory = edit_config()
  assert main(["verify", str(directory), "--sha256"]) == 0
  (lines := directory.parent / "sums").mkdir(exist_ok=True)
  sums = lines / "sums.txt"
  sums.write_text(capsys.readouterr().out)
  assert main(["verify", str(directory), "--checksums", str(sums)]) == 0
  raw = (directory / "config.json").read_text()
  (directory / "config.json").write_text(raw + " ")
  os.rename(directory / "model.safetensors", directory / "renamed.safetensors")
  assert main(["verify", str(directory), "--checksums", str(sums)]) == 1
  err = capsys.readouterr().err
  assert "config.json has SHA-256" in err
  assert "model.safetensors is missing" in err
  sums.write_text("no checksums")
  assert main(["verify", str(directory), "--checksums", str(sums)]) == 1
  assert "is not a line of sha256sum" in capsys.readouterr().err
  assert main(["verify", str(directory), "--checksums", str(tmp_path / "none")]) == 1
  assert "cannot be read" in capsys.readouterr().err


def test_a_single_file_is_verified(write_gguf, tmp_path, capsys):
  path = write_gguf(tmp_path / "model.gguf")
  assert main(["verify", str(path), "--sha256"]) == 0
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  assert capsys.readouterr().out == f"{digest}  model.gguf\n"
  (tmp_path / "SHA256SUMS").write_text(f"{digest}  model.gguf\n")
  assert main(["verify", str(path), "--checksums", str(tmp_path / "SHA256SUMS")]) == 0
