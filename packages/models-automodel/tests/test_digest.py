import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from models_automodel import AutoModel, CheckpointError, digest
from models_automodel.cli import main


def test_a_checkpoint_has_the_digest_of_its_model_on_every_mesh(checkpoint):
  directory, _ = checkpoint
  expected = digest(directory)
  for mesh in (jax.make_mesh((2, 2), ("fsdp", "tp")), Mesh(np.array(jax.devices()[:2]), ("tp",))):
    model, _ = AutoModel.from_pretrained(str(directory), mesh)
    assert digest(model) == expected
    assert digest(directory, mesh=mesh) == expected


def test_arguments_of_from_pretrained_count(checkpoint):
  directory, _ = checkpoint
  model, _ = AutoModel.from_pretrained(str(directory), dtype="bfloat16")
  assert digest(directory, dtype="bfloat16") == digest(model) != digest(directory)


def test_a_changed_weight_is_found_by_name(checkpoint):
  directory, _ = checkpoint
  model, _ = AutoModel.from_pretrained(str(directory))
  weight = model.layers[1].mlp.up_proj.w
  weight.set_value(weight[...].at[0, 0].set(np.nextafter(weight[0, 0], 9)))
  assert digest(model).differences(digest(directory)) == ["layers.1.mlp.up_proj.w"]


def test_a_model_in_memory_takes_no_arguments(checkpoint):
  directory, _ = checkpoint
  model, _ = AutoModel.from_pretrained(str(directory))
  with pytest.raises(TypeError, match="dtype: these arguments are for checkpoints only"):
    digest(model, dtype="bfloat16")


def test_a_broken_checkpoint_is_refused(checkpoint, edit_config):
  with pytest.raises(CheckpointError, match="missing"):
    digest(edit_config(num_hidden_layers=3))


def test_the_command_prints_it(checkpoint, capsys):
  directory, _ = checkpoint
  assert main(["digest", str(directory)]) == 0
  assert capsys.readouterr().out == f"{digest(directory)}\n"
  assert main(["digest", str(directory), "--parameters"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(digest(directory).parameters) + 1
  assert f"{digest(directory).parameters['lm_head.w']:016x}  lm_head.w" in lines
