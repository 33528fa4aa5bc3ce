import pytest


@pytest.fixture(autouse=True)
def no_programs_in_the_home_directory(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def directory(checkpoint):
  """The tiny model with a tokenizer of its own."""
  tokenizers = pytest.importorskip("tokenizers")
  path, _ = checkpoint
  vocabulary = {word: i for i, word in enumerate(["[UNK]", "up", "down", "left", "right", *"abcdefgh"])}
  engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
  engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  engine.save(str(path / "tokenizer.json"))
  return str(path)
