import os

import numpy as np
import pytest
from flax import nnx

from models_automodel import AutoModel, ConfigError, SourceFilesError


@pytest.fixture
def repository(hub, checkpoint):
  directory, _ = checkpoint
  files = {name: (directory / name).read_bytes() for name in ("config.json", "model.safetensors")}
  files |= {
    "pytorch_model.bin": b"\x80" * 1000,
    "README.md": b"# weights",
    "original/consolidated.00.pth": b"\x80",
  }
  return hub.add("some/llama", files)


def test_a_repository_loads_at_the_commit_that_was_resolved(hub, repository, checkpoint, tmp_path):
  model, path = AutoModel.from_pretrained(
    "some/llama", model_download_path=str(tmp_path / "own"), progress=False
  )
  assert path.endswith(repository)
  assert path.startswith(str(tmp_path / "own"))
  assert os.path.exists(os.path.join(path, "model.safetensors"))
  np.testing.assert_array_equal(nnx.state(model)["lm_head"]["w"].get_value(), checkpoint[1]["lm_head.weight"])
  asked = " ".join(request.line for request in hub.requests)
  assert "pytorch_model.bin" not in asked
  assert "README" not in asked


def test_a_plan_downloads_headers_and_config_alone(hub, repository, checkpoint):
  plan = AutoModel.plan("some/llama", progress=False)
  assert plan.num_parameters == sum(t.size for t in checkpoint[1].values())
  weights = [request for request in hub.requests if request.host == "storage" and request.method == "GET"]
  assert weights
  assert all(request.range for request in weights)


def test_a_missing_repository_says_what_to_do(hub):
  with pytest.raises(SourceFilesError, match="nobody/nothing"):
    AutoModel.from_pretrained("nobody/nothing", progress=False)


def test_a_bad_config_is_refused_before_weights_are_downloaded(hub, checkpoint):
  directory, _ = checkpoint
  config = (directory / "config.json").read_text().replace('"silu"', '"gelu"')
  files = {
    "config.json": config.encode(),
    "model.safetensors": (directory / "model.safetensors").read_bytes(),
  }
  hub.add("some/llama", files)
  with pytest.raises(ConfigError, match="hidden_act"):
    AutoModel.from_pretrained("some/llama", progress=False)
  assert not [request for request in hub.requests if "safetensors" in request.path]
