import pytest

from models_core.config.keys import ConfigKeys, collect_notes
from models_core.config.rope import write_scaling
from models_core.errors import ConfigError
from models_core.rope_scaling import FrequencyFactors, LinearScaling, Llama3Scaling, YarnScaling

LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 8192)


class TestValues:
  @pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
      ("integer", 7, 7),
      ("integer", 7.0, 7),
      ("number", 7, 7.0),
      ("number", 1e-6, 1e-6),
      ("boolean", True, True),
      ("boolean", False, False),
    ],
  )
  def test_a_value_of_its_kind_is_read(self, kind, value, read):
    found = getattr(ConfigKeys({"key": value}), kind)("key")
    assert found == read
    assert type(found) is type(read)

  @pytest.mark.parametrize(
    ("kind", "value"),
    [
      (kind, value)
      for kind in ("integer", "number")
      for value in (0, -1, "7", True, [7], float("inf"), float("nan"), 10**400)
    ]
    + [("integer", 7.5), ("boolean", 1), ("boolean", "true"), ("boolean", 0)],
    ids=lambda value: str(value)[:9],
  )
  def test_a_value_of_another_kind_is_an_error_that_shows_it(self, kind, value):
    with pytest.raises(ConfigError, match=r"config\.json: key is .*expected"):
      getattr(ConfigKeys({"key": value}), kind)("key")

  @pytest.mark.parametrize("raw", [{}, {"key": None}])
  def test_a_missing_value_is_an_error_or_its_default(self, raw):
    for kind in ("integer", "number", "boolean"):
      with pytest.raises(ConfigError, match="key is missing"):
        getattr(ConfigKeys(raw), kind)("key")
    assert ConfigKeys(raw).integer("key", 3) == 3
    assert ConfigKeys(raw).boolean("key", False) is False

  def test_a_key_of_which_one_value_is_implemented(self):
    ConfigKeys({}).expect("act", "silu", "swish")
    ConfigKeys({"act": "swish"}).expect("act", "silu", "swish")
    with pytest.raises(ConfigError, match=r"act is 'gelu'.*'silu' or 'swish' alone"):
      ConfigKeys({"act": "gelu"}).expect("act", "silu", "swish")

  @pytest.mark.parametrize("raw", [None, [], "config", 1])
  def test_a_config_that_is_no_object_is_refused(self, raw):
    with pytest.raises(ConfigError, match="here: expected an object"):
      ConfigKeys(raw, "here")

  @pytest.mark.parametrize("config", [None, {}])
  def test_an_empty_quantisation_is_none(self, config, caplog):
    ConfigKeys({"quantization_config": config}).done()
    assert not caplog.records

  def test_null_is_not_absent_where_a_family_asks(self):
    keys = ConfigKeys({"null": None, "number": 1})
    assert keys.is_null("null")
    assert not keys.is_null("number")
    assert not keys.is_null("absent")


class TestUnknownKeys:
  def test_read_harmless_and_null_keys_are_fine(self):
    keys = ConfigKeys({"read": 1, "torch_dtype": "bfloat16", "id2label": {}, "odd": None})
    keys.integer("read")
    keys.done()

  def test_all_others_are_one_error(self):
    keys = ConfigKeys({"sliding_window": 1, "layer_types": [2] * 99, "read": 1})
    keys.integer("read")
    with pytest.raises(ConfigError) as caught:
      keys.done()
    words = str(caught.value)
    assert "layer_types=[2, 2, " in words
    assert "sliding_window=1 (a key of " in words
    assert "ignore_config_keys=['layer_types', 'sliding_window']" in words
    assert len(words) < 500

  def test_a_key_counts_as_read_also_where_its_default_was_taken(self):
    keys = ConfigKeys({"flag": False})
    keys.expect("flag", False)
    keys.rope(10_000.0)
    keys.done()

  def test_lists_of_layers(self):
    keys = ConfigKeys({"dense": [0, 2], "layer_types": ["full_attention", "sliding_attention"], "first": 0})
    assert keys.integers("dense") == (0, 2)
    assert keys.integers("absent", ()) == ()
    assert keys.sliding_layers(2) == (False, True)
    assert ConfigKeys({}).sliding_layers(2) is None
    assert keys.integer("first", minimum=0) == 0
    keys.done()

  @pytest.mark.parametrize("value", [1, [-1], [0.5], [True], "01"])
  def test_what_is_no_list_of_layers(self, value):
    with pytest.raises(ConfigError, match="expected a list of whole numbers"):
      ConfigKeys({"dense": value}).integers("dense")

  @pytest.mark.parametrize(
    "value", ["full_attention", ["full_attention"], ["full_attention", "chunked_attention"]]
  )
  def test_layer_types_that_are_not_known_or_not_as_many_as_layers(self, value):
    with pytest.raises(
      ConfigError, match="expected full_attention or sliding_attention for each of 2 layers"
    ):
      ConfigKeys({"layer_types": value}).sliding_layers(2)

  def test_a_family_names_further_harmless_keys(self):
    ConfigKeys({"max_window_layers": 7}).done(["max_window_layers"])


class TestRope:
  @pytest.mark.parametrize(
    ("raw", "theta", "scaling"),
    [
      ({"rope_theta": 1e4}, 1e4, None),
      ({"rope_theta": 10000}, 1e4, None),
      ({"rope_theta": 1e4, "rope_scaling": None}, 1e4, None),
      ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, SCALING),
      ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, SCALING),
      ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 1e4, None),
      ({"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, SCALING),
      ({"rope_scaling": LLAMA3 | {"rope_theta": 5e5}}, 5e5, SCALING),
      ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, 1e4, LinearScaling(2.0)),
      ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}}, 1e4, LinearScaling(2)),
      ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "frequency_factors", "factors": [1, 2.5]}}, 1e4, FrequencyFactors((1, 2.5))),
      ({"rope_theta": 1e4, "rope_scaling": YARN}, 1e4, YarnScaling(4.0, 32)),
      ({"rope_theta": 1e4, "rope_scaling": YARN | {"beta_fast": None}}, 1e4, YarnScaling(4.0, 32)),
      ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 64}, 1e4, YarnScaling(4, 64)),
    ],
    ids=range(14),
  )  # fmt: skip
  def test_old_and_new_spellings_say_the_same(self, raw, theta, scaling):
    keys = ConfigKeys(raw)
    assert keys.rope() == (theta, scaling)
    keys.done()

  def test_a_family_may_have_a_default_theta(self):
    with collect_notes() as notes:
      assert ConfigKeys({"rope_theta": 5.0}).rope(1e4) == (5.0, None)
      assert not notes
      assert ConfigKeys({}).rope(1e4) == (1e4, None)
    assert notes == ["config.json: rope_theta is not stated, and is 10000 as in transformers"]

  @pytest.mark.parametrize(
    ("scaling", "read", "unread"),
    [
      ({}, None, ""),
      ({"rope_type": "default"}, None, ""),
      ({"rope_type": "default", "factor": 1.0, "partial_rotary_factor": 1.0}, None, "factor"),
      ({"rope_type": "default", "mrope_section": [4, 2, 2]}, None, "mrope_section"),
      ({"finetuned": True}, None, "finetuned"),
      ({"original_max_position_embeddings": 64}, None, "original_max_position_embeddings"),
      ({"type": "linear", "factor": 2.0, "finetuned": True}, LinearScaling(2.0), "finetuned"),
      ({"type": "linear", "factor": 2.0, "original_max_position_embeddings": 64}, LinearScaling(2.0), "original_max_position_embeddings"),
      (LLAMA3 | {"beta_fast": 32, "mscale": 1.0}, SCALING, "beta_fast, rope_scaling.mscale"),
      (YARN | {"attn_factor": 0.9}, YarnScaling(4.0, 32), "attn_factor"),
    ],
    ids=str,
  )  # fmt: skip
  def test_what_transformers_does_not_read_is_noted(self, scaling, read, unread):
    keys = ConfigKeys({"rope_theta": 1e4, "rope_scaling": scaling})
    assert keys.rope() == (1e4, read)
    with collect_notes() as notes:
      keys.done()
    assert notes == ([f"config.json: not read by this architecture: rope_scaling.{unread}"] if unread else [])

  def test_the_length_of_pretraining_may_stand_beside_the_scaling(self):
    rest = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    for scaling in (rest, LLAMA3):
      keys = ConfigKeys(
        {"rope_theta": 1e4, "rope_scaling": scaling, "original_max_position_embeddings": 8192}
      )
      assert keys.rope() == (1e4, SCALING)
      with collect_notes() as notes:
        keys.done()
      assert not notes
    with collect_notes() as notes:
      ConfigKeys({"original_max_position_embeddings": 8192}).done()
    assert len(notes) == 1

  def test_an_empty_object_is_none(self):
    keys = ConfigKeys({"rope_theta": 1e4, "rope_scaling": {}, "rope_parameters": LLAMA3})
    assert keys.rope() == (1e4, SCALING)

  @pytest.mark.parametrize(
    ("raw", "message"),
    [
      ({}, "rope_theta is missing"),
      ({"rope_scaling": LLAMA3}, "rope_theta is missing"),
      ({"rope_theta": "1e4"}, "rope_theta is '1e4', expected a positive number"),
      ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta is 'x'"),
      ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters.rope_theta is -1.0"),
      ({"rope_theta": 1e4, "rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
      ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "theta is stated twice and differs"),
      ({"rope_theta": 1e4, "rope_scaling": {"rope_theta": 2e4}}, "theta is stated twice and differs"),
      ({"rope_theta": 1e4, "rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "scaling is stated twice"),
      ({"rope_theta": 1e4, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 32.0}}, "scaling is stated twice"),
      ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_type and type, and they differ"),
      ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "longrope", "factor": 4}}, "'longrope' is not implemented"),
      ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn"}}, "lacks factor, original_max_position_embeddings"),
      ({"rope_theta": 1e4, "rope_scaling": YARN | {"truncate": 1}}, "truncate is 1, expected true or false"),
      ({"rope_theta": 1e4, "rope_scaling": YARN | {"beta_slow": -1}}, "beta_slow is -1"),
      ({"rope_theta": 1e4, "rope_scaling": {"factor": 8.0}}, "rope_scaling has factor=8.0, but rope_type is missing"),
      ({"rope_theta": 1e4, "rope_scaling": {"rope_type": None, "short_factor": [1.0]}}, "rope_type is missing"),
      ({"rope_theta": 1e4, "rope_parameters": {"beta_fast": 32}}, "rope_parameters has beta_fast=32, but rope_type is missing"),
      ({"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"rope_type": "default"}}, "high_freq_factor=4.0, low_freq_factor=1.0, but its rope_type is 'default'"),
      ({"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor is 0.5"),
      ({"rope_theta": 1e4, "rope_scaling": {"full_attention": LLAMA3}}, r"objects for kinds of layers \(full_attention\)"),
      ({"rope_theta": 1e4, "rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, "is 8192 in config.json: rope_scaling and 64 beside it"),
      ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not implemented"),
      ({"rope_theta": 1e4, "rope_scaling": {"rope_type": ["llama3"]}}, "not implemented"),
      ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor, high_freq"),
      ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2'"),
      ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor is 0"),
    ],
    ids=str,
  )  # fmt: skip
  def test_what_is_missing_wrong_or_contradictory_is_an_error(self, raw, message):
    with pytest.raises(ConfigError, match=message):
      ConfigKeys(raw).rope()

  @pytest.mark.parametrize(
    "scaling",
    [
      None,
      SCALING,
      LinearScaling(2.0),
      FrequencyFactors((1.0, 2.0)),
      YarnScaling(4.0, 32),
      YarnScaling(4.0, 32, 1.5, 16.0, 2.0, 0.5, 0.7, False),
    ],
    ids=range(6),
  )
  def test_a_scaling_is_read_as_it_was_written(self, scaling):
    written = write_scaling(scaling)
    assert ConfigKeys({"rope_theta": 1e4, "rope_scaling": written or None}).rope() == (1e4, scaling)

  def test_a_scaling_that_has_no_spelling_is_not_written(self):
    with pytest.raises(ConfigError, match="object cannot be written"):
      write_scaling(object())
