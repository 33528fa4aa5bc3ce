import pytest


@pytest.fixture(autouse=True)
def no_programs_in_the_home_directory(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
