import dataclasses
import pickle

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from models_core.errors import ModelsError, ShardingError
from models_core.rope_scaling import FrequencyFactors, LinearScaling, Llama3Scaling
from models_core.sharding import ShardingConfig, axis_names, default_sharding, fit, named

DEFAULT = ShardingConfig.get_default_sharding()


@pytest.mark.parametrize(
  ("entry", "names"),
  [(None, ()), ("tp", ("tp",)), ((), ()), (("fsdp", "tp"), ("fsdp", "tp")), (["tp"], ("tp",))],
)
def test_the_names_of_an_entry(entry, names):
  assert axis_names(entry) == names


class TestFit:
  @pytest.mark.parametrize(
    ("shape", "spec", "fitted"),
    [
      ((4, 6), P(), P()),
      ((4, 6), P("fsdp", "tp"), P("fsdp", "tp")),
      ((4, 6), ("tp", None), P("tp", None)),
      ((4, 6), P(None, ("fsdp",)), P(None, ("fsdp",))),
      (
        (4, 6),
        P(
          ("fsdp", "tp"),
        ),
        P(("fsdp", "tp")),
      ),
      ((4, 6), P((), "tp"), P(None, "tp")),
      ((0, 4), P("fsdp", "tp"), P("fsdp", "tp")),
      ((), P(), P()),
    ],
  )
  def test_what_the_mesh_holds_stays(self, shape, spec, fitted, mesh):
    assert fit(shape, spec, mesh) == (fitted, ())
    # What is said to fit is what JAX takes.
    assert jax.device_put(np.zeros(shape), NamedSharding(mesh, fitted)).shape == shape

  @pytest.mark.parametrize(
    ("shape", "spec", "fitted", "axis", "reason", "remedy"),
    [
      (
        (3, 4),
        P("fsdp", "tp"),
        P(None, "tp"),
        0,
        "3 is not divisible by fsdp=2",
        "sizes that divide it: 1, 3",
      ),
      ((4, 6), P(None, ("fsdp", "tp")), P(None, None), 1, "6 is not divisible by fsdp*tp=4", "1, 2, 3, 6"),
      ((1, 4), P("tp"), P(None), 0, "1 is not divisible by tp=2", "sizes that divide it: 1"),
      ((4, 4), P("pp", "tp"), P(None, "tp"), 0, "the mesh has no axis 'pp'", "its axes are fsdp, tp"),
      ((4, 4), P(("tp", "pp")), P(None), 0, "the mesh has no axis 'pp'", "name one of them"),
    ],
  )
  def test_what_it_does_not_hold_is_whole_and_explained(
    self, shape, spec, fitted, axis, reason, remedy, mesh
  ):
    found, (misfit,) = fit(shape, spec, mesh)
    assert found == fitted
    assert (misfit.axis, misfit.size, misfit.reason) == (axis, shape[axis], reason)
    assert remedy in misfit.remedy

  def test_each_device_gets_whole_heads(self, mesh):
    assert fit((6, 4), P("tp", "fsdp"), mesh, (2, None)) == (P("tp", "fsdp"), ())
    fitted, (misfit,) = fit((6, 4), P("tp", "fsdp"), mesh, (3, None))
    assert fitted == P(None, "fsdp")
    assert (misfit.axis, misfit.reason) == (0, "3 heads are not divisible by tp=2")

  def test_a_symbolic_size_is_sharded_only_if_it_surely_divides(self, mesh):
    (b,) = jax.export.symbolic_shape("b")
    assert fit((b, 4), P("fsdp", "tp"), mesh)[0] == P(None, "tp")
    assert fit((2 * b, 4), P("fsdp", "tp"), mesh)[0] == P("fsdp", "tp")

  @pytest.mark.parametrize("spec", [P("tp", "tp"), ("tp", ("fsdp", "tp")), (("tp", "tp"),), ("pp", "pp")])
  def test_a_mesh_axis_twice_is_an_error(self, spec, mesh):
    with pytest.raises(ShardingError, match="twice"):
      fit((4, 4), spec, mesh)

  def test_more_entries_than_axes_are_an_error(self, mesh):
    with pytest.raises(ShardingError, match="more entries than the shape"):
      fit((4,), P("fsdp", "tp"), mesh)

  def test_an_abstract_mesh_and_any_number_of_axes_will_do(self):
    mesh = AbstractMesh((2, 1, 3), ("data", "fsdp", "tp"))
    assert fit((6, 5, 6), P(("data", "tp"), "fsdp"), mesh) == (P(("data", "tp"), "fsdp"), ())
    assert fit((4,), P("tp"), mesh)[0] == P(None)

  def test_the_remedy_for_a_large_axis_stays_short(self, mesh):
    _, (misfit,) = fit((3**12,), P("tp"), mesh)
    assert len(misfit.remedy) < 100


class TestShardingConfig:
  @pytest.mark.parametrize(
    ("field", "axes", "spec"),
    [
      ("q_weight_dnh", "d n h", P("fsdp", "tp", None)),
      ("q_weight_dnh", "n h d", P("tp", None, "fsdp")),
      ("q_weight_dnh", "(n h) d", P("tp", "fsdp")),
      ("o_weight_nhd", "d (n h)", P("fsdp", "tp")),
      ("kv_bias_nh", "(k h)", P("tp")),
      ("exp_weight_edf", "(e f) d", P("tp", "fsdp")),
      ("kv_weight_dnh", "k h d", P("tp", None, "fsdp")),
      ("o_weight_nhd", "d n h", P("fsdp", "tp", None)),
      ("emb_vd", "v d", P("tp", "fsdp")),
      ("emb_vd", "d v", P("fsdp", "tp")),
      ("ffw_weight_df", "f d", P("tp", "fsdp")),
      ("ffw_weight_fd", "d f", P("fsdp", "tp")),
      ("rms_norm_weight", "d", P("tp")),
      ("qk_norm_weight", "h", P(None)),
      ("act_btnh", "b s k h", P("fsdp", None, "tp", None)),
      ("exp_weight_edf", "e f d", P("tp", None, "fsdp")),
      ("q_weight_dnh", "x n y", P(None, "tp", None)),
    ],
  )
  def test_entries_follow_their_letters_in_any_order(self, field, axes, spec):
    assert DEFAULT.spec(field, axes) == spec

  @pytest.mark.parametrize(
    ("field", "axes", "spec"),
    [
      ("lm_head_vd", "v d", P("x", "y")),
      ("q_bias_nh", "n h", P("b", "c")),
      ("kv_bias_nh", "k h", P("e", "f")),
      ("router_weight_ed", "e d", P("g", "h")),
    ],
  )
  def test_a_field_left_out_falls_back_letter_by_letter(self, field, axes, spec):
    changes = {
      "emb_vd": ("x", "y"),
      "q_weight_dnh": ("a", "b", "c"),
      "kv_weight_dnh": ("d", "e", "f"),
      "exp_weight_edf": ("g", "h", "i"),
    }
    config = dataclasses.replace(DEFAULT, **changes)
    assert config.spec(field, axes) == spec
    assert dataclasses.replace(config, **{field: ("own", None)}).spec(field, axes) == P("own", None)

  def test_a_field_may_be_a_partition_spec_or_hold_tuples(self):
    config = dataclasses.replace(DEFAULT, q_weight_dnh=P(("fsdp", "sp"), "tp", None))
    assert config.spec("q_weight_dnh", "n h d") == P("tp", None, ("fsdp", "sp"))

  @pytest.mark.parametrize(
    ("field", "value"),
    [
      ("emb_vd", ("tp",)),
      ("q_weight_dnh", ("fsdp", "tp")),
      ("rms_norm_weight", ("tp", None)),
      ("act_btd", P("fsdp")),
      ("lm_head_vd", ()),
    ],
  )
  def test_a_wrong_number_of_entries_names_the_field_and_its_axes(self, field, value):
    with pytest.raises(ShardingError, match=rf"ShardingConfig\.{field}=.*has {len(value)} entries"):
      dataclasses.replace(DEFAULT, **{field: value})

  def test_sampling_gathers_no_parameters(self):
    config = ShardingConfig.get_default_sharding(is_sampling=True)
    for field in dataclasses.fields(config):
      if not field.name.startswith("act_"):
        assert "fsdp" not in (getattr(config, field.name) or ())
    assert config.act_btd == ("fsdp", None, None)
    assert config.rms_norm_weight == (None,)


@pytest.mark.parametrize(
  "config",
  [
    DEFAULT,
    dataclasses.replace(DEFAULT, emb_vd=P("tp", ("a", "b"))),
    LinearScaling(8.0),
    Llama3Scaling(8.0, 1.0, 4.0, 8192),
    FrequencyFactors((1.0, 2.0)),
  ],
  ids=range(5),
)
def test_configs_are_values(config):
  again = pickle.loads(pickle.dumps(config))
  assert again == config
  assert hash(again) == hash(config)
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(config, dataclasses.fields(config)[0].name, None)


def test_without_a_mesh_a_sharding_is_the_default_device(mesh):
  assert named(mesh, P("tp")) == NamedSharding(mesh, P("tp"))
  assert named(None, P("tp")) == SingleDeviceSharding(jax.local_devices()[0])
  with jax.default_device(jax.devices()[3]):
    assert default_sharding() == SingleDeviceSharding(jax.devices()[3])


def test_sharding_errors_are_value_errors_of_the_house():
  assert issubclass(ShardingError, ModelsError)
  assert issubclass(ShardingError, ValueError)
