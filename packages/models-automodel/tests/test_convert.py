"""`automodel convert` and `automodel verify`."""

import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models_automodel import AutoModel, CheckpointError, ConfigError, SaveError, SourceFilesError
from models_automodel.cli import main
from models_automodel.convert import convert
from models_automodel.text import load_tokenizer
from models_automodel.text.generation_config import read_context
from models_automodel.verify import verify
from models_core.formats import GGUF, SAFETENSORS, as_files
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


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def add_tokenizer(writer, pre="default", templates=()):
  tokens = ["<s>", "</s>", "<|eot_id|>", *LETTERS, "ab", "\u0120", "<|im_end|>"]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
  writer.add_token_merges(["a b"])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  writer.add_eot_token_id(2)
  writer.add_add_bos_token(True)
  if templates:
    writer.add_chat_template([{"name": name, "template": name} for name in templates])


@pytest.mark.parametrize("how", ["convert", "save"])
def test_the_tokenizer_of_a_gguf_file_is_written(how, write_gguf, tmp_path):
  source = write_gguf(
    tmp_path / "m.gguf", lambda w: add_tokenizer(w, templates=("default", "tool_use", "rag"))
  )
  out = tmp_path / "out"
  if how == "convert":
    convert(source, out, progress=False)
  else:
    AutoModel.save_pretrained(AutoModel.from_pretrained(source, progress=False)[0], out, base=source)
  written = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
  templates = {"chat_template.jinja", *(f"additional_chat_templates/{n}.jinja" for n in ("tool_use", "rag"))}
  tokenizer = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
  assert written == {"config.json", "model.safetensors"} | templates | tokenizer
  contexts = [
    read_context(format.read(as_files(place))) for format, place in ((GGUF, source), (SAFETENSORS, out))
  ]
  assert contexts[0] == contexts[1] is not None
  before, after = load_tokenizer(source), load_tokenizer(out)
  for text in ("abba", "<s>ab c", "cab<|eot_id|>"):
    assert after.encode(text) == before.encode(text)
  assert (after.before, after.after, after.special_tokens) == (
    before.before,
    before.after,
    before.special_tokens,
  )
  assert after.stop_ids == before.stop_ids == {1, 2, 31}
  assert {name: t.source for name, t in after.chat_templates.items()} == {
    name: t.source for name, t in before.chat_templates.items()
  }
  # A copy of the copy has the templates, too.
  convert(out, tmp_path / "again", progress=False)
  assert {
    file.relative_to(tmp_path / "again").as_posix() for file in (tmp_path / "again").rglob("*.*")
  } == written


def test_a_tokenizer_beside_a_gguf_file_is_kept(write_gguf, tmp_path):
  (tmp_path / "in").mkdir()
  write_gguf(tmp_path / "in" / "m.gguf", add_tokenizer)
  (tmp_path / "in" / "tokenizer.json").write_text("{}")
  convert(tmp_path / "in", tmp_path / "out", progress=False)
  assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
  assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def test_a_tokenizer_that_is_not_implemented_is_left_out_with_a_note(write_gguf, tmp_path, caplog):
  source = write_gguf(tmp_path / "m.gguf", lambda w: add_tokenizer(w, pre="own"))
  convert(source, tmp_path / "out", progress=False)
  assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
  assert "the tokenizer is left out: " in caplog.text
  assert "tokenizer.ggml.pre is 'own'" in caplog.text


def test_the_name_of_a_template_leads_nowhere_else(write_gguf, tmp_path, caplog):
  def add(writer):
    add_tokenizer(writer)
    writer.add_string("tokenizer.chat_template.../../evil", "x")

  convert(write_gguf(tmp_path / "m.gguf", add), tmp_path / "out", progress=False)
  assert not list(tmp_path.rglob("*evil*"))
  assert "its name is no file name" in caplog.text
