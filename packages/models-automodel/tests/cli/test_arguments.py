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


@pytest.mark.parametrize("size", ["abc", "0", "-1GB"])
def test_a_shard_size_must_be_one(size, capsys):
  with pytest.raises(SystemExit):
    main(["convert", "x", "y", f"--max-shard-size={size}"])
  assert 'write it as 5000000000, "5GB" or "2GiB"' in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-5", "8k"])
def test_a_context_is_a_number_of_tokens(count, capsys):
  with pytest.raises(SystemExit):
    main(["show", "x", f"--context={count}"])
  assert f"'{count}' is not a number of tokens" in capsys.readouterr().err
