import pytest

from models_core.weights.table import matches


@pytest.mark.parametrize(
  ("pattern", "name", "expected"),
  [
    ("vision_tower.**", "vision_tower.layers.0.weight", True),
    ("vision_tower.**", "vision_tower.bias", True),
    ("vision_tower.**", "vision_tower", False),
    ("vision_tower.**", "vision_tower.", False),
    ("vision_tower.**", "vision_towers.bias", False),
    ("vision_tower.**", "model.vision_tower.bias", False),
    ("layers.{i}.extra.**", "layers.7.extra.a.b", True),
    ("layers.{i}.extra.**", "layers.x.extra.a.b", False),
    ("vision_tower", "vision_tower.bias", False),
    ("layers.{i}.bias", "layers.7.bias", True),
  ],
)
def test_a_pattern_matches_whole_names_or_all_below_one(pattern, name, expected):
  assert matches(pattern, name) is expected
