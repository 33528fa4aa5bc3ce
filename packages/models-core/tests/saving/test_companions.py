"""Which files come along with a model."""

import pytest

from models_core.formats import LocalFiles
from models_core.saving.companions import companions_of, is_companion

COPIED = """
  tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
  chat_template.jinja chat_template.json generation_config.json preprocessor_config.json processor_config.json
  additional_chat_templates/tool_use.jinja video_preprocessor_config.json LICENSE LICENSE.txt license.md LICENCE NOTICE Notice.txt USE_POLICY.md
"""
WRITTEN = "config.json model.safetensors.index.json"
OTHERS = """
  model.safetensors model-00001-of-00002.safetensors pytorch_model.bin pytorch_model.bin.index.json model.onnx
  model-q4.gguf README.md .gitattributes optimizer.pt scheduler.pt rng_state_0.pth training_args.bin trainer_state.json
  all_results.json events.out.tfevents.1 adapter_config.json modeling_own.py origin.json original/tokenizer.model
  tokenizer/vocab.json checkpoint-5/tokenizer.json additional_chat_templates/notes.txt
  checkpoint-5/additional_chat_templates/tool_use.jinja
"""


@pytest.mark.parametrize("name", (COPIED + WRITTEN).split())
def test_what_belongs_to_a_model(name):
  assert is_companion(name)


@pytest.mark.parametrize("name", OTHERS.split())
def test_what_does_not(name):
  assert not is_companion(name)


def test_savers_copy_what_they_do_not_write(tmp_path):
  for name in (COPIED + WRITTEN + OTHERS).split():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  assert companions_of(LocalFiles(str(tmp_path))) == sorted(COPIED.split())
