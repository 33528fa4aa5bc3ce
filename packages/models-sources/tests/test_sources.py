import subprocess
import sys

import pytest

import models_sources
from models_sources import (
  AccessError,
  ConnectionFailedError,
  CorruptFilesError,
  FilesNotFoundError,
  InvalidNameError,
  SourceError,
  get_source,
  source_names,
)
from models_sources.names import check_name, missing_files


def test_sources_are_announced():
  assert {"local", "huggingface", "gcs", "s3"} <= set(source_names())
  assert get_source("local").__name__ == "models_sources.local"


def test_an_unknown_source_lists_the_available_ones():
  with pytest.raises(InvalidNameError, match=r"no source 'hugingface'.*available are .*huggingface, .*local"):
    get_source("hugingface")


@pytest.mark.parametrize(
  ("statement", "absent"),
  [
    (
      "import models_sources.testing; get_source('local')",
      {"huggingface_hub", "jax", "numpy", "models_core"},
    ),
    ("get_source('huggingface')", {"models_sources.local", "jax", "numpy", "models_core"}),
    ("get_source('gcs')", {"models_sources.s3", "huggingface_hub", "jax", "numpy", "models_core"}),
  ],
  ids=["local", "huggingface", "gcs"],
)
def test_only_the_asked_for_source_is_imported(statement, absent):
  program = f"import sys; from models_sources import get_source; {statement}; sys.exit(bool({absent!r} & set(sys.modules)))"
  assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_missing_client_names_what_installs_it():
  program = (
    "import sys; sys.modules['obstore'] = None; from models_sources import get_source; get_source('s3')"
  )
  done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
  error = "MissingClientError: object stores need the package obstore: install models-sources[stores]"
  assert done.stderr.strip().splitlines()[-1] == f"models_sources.errors.{error}"
  assert issubclass(models_sources.MissingClientError, ImportError)


@pytest.mark.parametrize(
  ("error", "builtin"),
  [
    (SourceError, OSError),
    (InvalidNameError, ValueError),
    (FilesNotFoundError, FileNotFoundError),
    (AccessError, PermissionError),
    (ConnectionFailedError, ConnectionError),
    (CorruptFilesError, OSError),
  ],
)
def test_errors_are_built_ins_too(error, builtin):
  assert issubclass(error, SourceError)
  assert issubclass(error, builtin)
  assert str(error("what, where")) == "what, where"
  assert error.__name__ in models_sources.__all__


@pytest.mark.parametrize(
  "name", ["", "/a", "a/", "../a", "a/../b", "a//b", ".", "./a", "C:/a", "c:a", "a\\b", "a\0"]
)
def test_names_that_lead_elsewhere_are_refused(name):
  with pytest.raises(InvalidNameError, match="is not a valid file name"):
    check_name(name)


@pytest.mark.parametrize("name", ["a", "a/b", "..a", "a..b", "...", "model-00001-of-00002.safetensors"])
def test_names_that_stay_are_kept(name):
  assert check_name(name) == name


def test_missing_files_name_the_nearest():
  available = ["config.json", "model.safetensors"]
  assert "x has no confg.json; did you mean config.json?" in str(
    missing_files("x", ["confg.json"], available)
  )
  assert "it has config.json, model.safetensors" in str(missing_files("x", ["zzz"], available))
  assert "it has no files" in str(missing_files("x", ["zzz"], []))
