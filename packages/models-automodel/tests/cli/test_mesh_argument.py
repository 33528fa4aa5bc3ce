import pytest

from models_automodel.cli import main
from models_automodel.cli.mesh_argument import parse_mesh


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=0", "fsdp=2,fsdp=4", "2,4", "fsdp=2;tp=4"])
def test_a_mesh_must_be_spelled_right(text, capsys):
  with pytest.raises(SystemExit):
    main(["plan", "x", "--mesh", text])
  assert "write it like fsdp=2,tp=4" in capsys.readouterr().err


def test_a_mesh_keeps_its_order():
  assert list(parse_mesh("tp=4, fsdp=2").items()) == [("tp", 4), ("fsdp", 2)]
