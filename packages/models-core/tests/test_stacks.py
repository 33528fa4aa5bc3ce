import pytest

from models_core.stacks import find_stacks, in_order, layer_names, layers_of, name_in, stack_name


@pytest.mark.parametrize(
  ("kinds", "stacks"),
  [
    ("", []),
    ("A", ["0:1"]),
    ("AB", ["0:1", "1:2"]),
    ("A" * 16, ["0:16"]),
    ("LG" * 13, ["0:26:2", "1:26:2"]),
    ("SSG" * 2 + "SS", ["0:6:3", "1:6:3", "2:6:3", "6:8"]),
    ("A" * 21 + "B" * 7, ["0:21", "21:28"]),
    ("DMMMM", ["0:1", "1:5"]),
    ("DDMDMDM", ["0:2", "2:6:2", "3:6:2", "6:7"]),
  ],
)
def test_the_units_that_cover_most_layers_are_stacked(kinds, stacks):
  found = find_stacks(kinds)
  assert [stack_name(stack) for stack in found] == stacks
  assert sorted(layer for stack in found for layer in stack) == list(range(len(kinds)))
  for stack in found:
    assert len({kinds[layer] for layer in stack}) == 1


def test_the_name_of_a_stack_is_a_slice_of_layers():
  name = "model.layers.1:24:6.attn.q_proj.w"
  assert layers_of(name) == range(1, 24, 6)
  assert layer_names(name) == [f"model.layers.{i}.attn.q_proj.w" for i in (1, 7, 13, 19)]
  assert name_in(name, 7) == "model.layers.7.attn.q_proj.w"
  assert layers_of("0:3") == range(3)
  for plain in ("layers.3.attn.w", "layers.a:b.w", "layers.0:3x.w"):
    assert layers_of(plain) is None
    assert layer_names(plain) == [plain]


def test_layers_are_in_the_order_of_their_numbers():
  names = ["embedder.w", "final_norm.w", "layers.2.a.w", "layers.10.a.w", "lm_head.w"]
  assert in_order(reversed(names)) == names
