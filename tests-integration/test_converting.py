"""`automodel convert` on real weights."""

import numpy as np

from models_automodel import AutoModel
from models_automodel.cli import _packaged_model
from models_automodel.convert import convert


def test_a_gguf_file_becomes_a_directory(tmp_path):
  source = _packaged_model()
  convert(source, tmp_path / "out", dtype="bfloat16", progress=False)
  model, _ = AutoModel.from_pretrained(str(tmp_path / "out"), progress=False)
  again, _ = AutoModel.from_pretrained(source, dtype="bfloat16", progress=False)
  assert model.config == again.config
  np.testing.assert_array_equal(
    model.layers[3].attn.q_proj.w.get_value(), again.layers[3].attn.q_proj.w.get_value()
  )
