import json

import pytest

from models_automodel.cli import answering, fastest, main
from models_automodel.cli.fastest import DTYPES, by_speed

SLOW_BFLOAT16 = {"float32": 1.0, "bfloat16": 20.0}


def test_the_fastest_comes_first():
  times = by_speed()
  assert set(times) == set(DTYPES)
  assert list(times.values()) == sorted(times.values())
  assert min(times.values()) > 0


def test_a_second_start_chooses_the_same(monkeypatch, tmp_path):
  monkeypatch.setattr(fastest, "_cache_file", lambda: str(tmp_path / "new" / "times.json"))
  monkeypatch.setattr(fastest, "_measured", lambda: dict(reversed(SLOW_BFLOAT16.items())))
  assert list(by_speed()) == ["float32", "bfloat16"]
  monkeypatch.setattr(fastest, "_measured", None)
  assert by_speed() == SLOW_BFLOAT16
  (path,) = (tmp_path / "new").iterdir()
  assert list(json.loads(path.read_text()).values()) == [{"bfloat16": 20.0, "float32": 1.0}]


@pytest.mark.parametrize("broken", ["", "[]", "{"])
def test_a_broken_file_is_measured_anew(broken, monkeypatch, tmp_path):
  monkeypatch.setattr(fastest, "_cache_file", lambda: str(tmp_path / "times.json"))
  monkeypatch.setattr(fastest, "_measured", lambda: SLOW_BFLOAT16)
  (tmp_path / "times.json").write_text(broken)
  assert by_speed() == SLOW_BFLOAT16


def test_generate_says_what_it_takes(directory, capsys, monkeypatch):
  monkeypatch.setattr(answering, "by_speed", lambda: SLOW_BFLOAT16)
  assert main(["generate", directory, "up", "--max-new-tokens", "2"]) == 0
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    "dtype: float32, the fastest here (float32 1.0 ms, bfloat16 20.0 ms a product); --dtype chooses another"
  )
  assert main(["generate", directory, "up", "--max-new-tokens", "2", "--dtype", "bfloat16"]) == 0
  assert not capsys.readouterr().err


def test_what_does_not_fit_is_no_choice(directory, capsys, monkeypatch):
  monkeypatch.setattr(answering, "by_speed", lambda: SLOW_BFLOAT16)
  # 5,968 parameters take 23,872 bytes in float32, and 11,936 in bfloat16.
  monkeypatch.setattr("models_automodel.cli.memory.free_host_bytes", lambda: 20_000)
  assert main(["generate", directory, "up", "--max-new-tokens", "2"]) == 0
  assert "dtype: bfloat16, since float32, the fastest here, does not fit" in capsys.readouterr().err
  monkeypatch.setattr("models_automodel.cli.memory.free_host_bytes", lambda: 10_000)
  assert main(["generate", directory, "up", "--max-new-tokens", "2"]) == 1
  assert "of this machine, but 0.00 GiB are free" in capsys.readouterr().err
