"""The command that a missing extra is answered with, for each way in which an installation is made."""

import importlib
import json

import pytest

from models_core.extras import MissingExtraError, install_command, require

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def install(tmp_path, monkeypatch):
  """Announces distributions by the files that installers write, in front of the real ones."""
  monkeypatch.syspath_prepend(tmp_path)

  def announce(name, url=None, extras=(), installer="uv"):
    info = tmp_path / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", "Version: 0.1.0", *(f"Provides-Extra: {extra}" for extra in extras)]
    (info / "METADATA").write_text("Metadata-Version: 2.3\n" + "\n".join(lines) + "\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    if url is not None:
      (info / "direct_url.json").write_text(json.dumps(url))
    importlib.invalidate_caches()

  return announce


GIT = {"url": "https://example.org/models", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}
CASES = {
  "index, by uv": (None, "uv", 'uv pip install "models-core[gguf]"'),
  "index, by pip": (None, "pip", 'pip install "models-core[gguf]"'),
  "git": (
    GIT | {"subdirectory": "packages/models-core"},
    "uv",
    f'uv pip install "models-core[gguf] @ git+https://example.org/models@{COMMIT}#subdirectory=packages/models-core"',
  ),
  "editable": (
    {"url": "file:///a%20clone/packages/models-core", "dir_info": {"editable": True}},
    "uv",
    'uv pip install --editable "/a clone/packages/models-core[gguf]"',
  ),
  "folder": (
    {"url": "file:///clone/packages/models-core", "dir_info": {}},
    "uv",
    'uv pip install --no-editable "/clone/packages/models-core[gguf]"',
  ),
  "wheel": (
    {"url": "file:///dist/models_core-0.1.0-py3-none-any.whl", "archive_info": {}},
    "pip",
    'pip install "models-core[gguf] @ file:///dist/models_core-0.1.0-py3-none-any.whl"',
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_command_fits_the_installation(install, case):
  url, installer, command = CASES[case]
  install("models-automodel")
  install("models-core", url, ["gguf"], installer)
  assert install_command("models-core[gguf]") == command


def test_users_of_automodel_get_its_extras(install):
  install("models-core", GIT, ["gguf", "testing"])
  install("models-automodel", None, ["gguf", "all"])
  assert install_command("models-core[gguf]") == 'uv pip install "models-automodel[gguf]"'
  assert install_command("models-core[testing]").startswith(
    'uv pip install "models-core[testing] @ git+https:'
  )


def test_a_third_party_is_named_itself(install):
  install("models-automodel", None, ["gguf"])
  install("their-family", None, ["gguf"], "pip")
  assert install_command("their-family[gguf]") == 'pip install "their-family[gguf]"'
  assert install_command("unknown[gguf]") == 'pip install "unknown[gguf]"'


def test_the_error_holds_the_command():
  with pytest.raises(
    MissingExtraError, match=r"^Painting needs the package no_such: (uv )?pip install .*\[no\]"
  ):
    require("no_such.module", "models-core[no]", "Painting")
