import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models_automodel import (
  AutoModel,
  CheckpointError,
  ModelsError,
  digest,
  from_checkpoint,
  iter_checkpoint,
  lazy_checkpoint,
  to_checkpoint,
)
from models_core.errors import AdapterError


def test_arrays_are_what_save_pretrained_writes(checkpoint, tmp_path):
  directory, _ = checkpoint
  model, _ = AutoModel.from_pretrained(
    str(directory), jax.make_mesh((2, 2), ("fsdp", "tp")), dtype="bfloat16"
  )
  AutoModel.save_pretrained(model, tmp_path / "saved", progress=False)
  saved = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
  for found in (to_checkpoint(model), dict(iter_checkpoint(model)), lazy_checkpoint(model)):
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
      assert np.asarray(found[name]).tobytes() == tensor.tobytes()


def test_a_sampler_gets_the_weights_of_a_trainer(checkpoint):
  directory, _ = checkpoint
  trainer, _ = AutoModel.from_pretrained(str(directory))
  sampler, _ = AutoModel.from_pretrained(str(directory), jax.make_mesh((4,), ("tp",)))
  weight = trainer.layers[0].attn.q_proj.w
  weight.set_value(weight[...] + 1)
  assert digest(sampler) != digest(trainer)
  from_checkpoint(sampler, lazy_checkpoint(trainer))
  assert digest(sampler) == digest(trainer)


def test_what_does_not_fit_changes_nothing(checkpoint):
  directory, tensors = checkpoint
  model, _ = AutoModel.from_pretrained(str(directory))
  before = digest(model)
  changed = {name: tensor + 1 for name, tensor in tensors.items()}
  del changed["model.norm.weight"]
  with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
    from_checkpoint(model, changed)
  assert digest(model) == before


def test_factors_need_their_alpha(checkpoint):
  directory, _ = checkpoint
  model, _ = AutoModel.from_pretrained(str(directory))
  model.layers[0].attn.q_proj.w_lora_a = nnx.LoRAParam(jax.numpy.ones((16, 2)))
  model.layers[0].attn.q_proj.w_lora_b = nnx.LoRAParam(jax.numpy.ones((2, 16)))
  with pytest.raises(AdapterError, match="give alpha="):
    to_checkpoint(model)
  name = "model.layers.0.self_attn.q_proj.weight"
  before = np.asarray(model.layers[0].attn.q_proj.w[...])
  # All factors are ones: each number grows by rank * alpha / rank.
  np.testing.assert_allclose(to_checkpoint(model, alpha=3.0)[name], before + 3, rtol=1e-6)


def test_a_model_of_nobody():
  class Mine(nnx.Module):
    pass

  with pytest.raises(
    ModelsError, match="Mine has no attribute config: give a model of an installed family, or call"
  ):
    to_checkpoint(Mine())
  mine = Mine()
  mine.config = 3
  with pytest.raises(ModelsError, match="belongs to no installed family"):
    from_checkpoint(mine, {})
