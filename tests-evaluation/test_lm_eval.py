"""lm-evaluation-harness itself, on a tiny model: its interface, and a task of its own from start to end."""

import json

import numpy as np
import pytest
import tokenizers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from models_automodel import AutoModel, load_text_model
from models_automodel.evaluation import evaluated
from models_core.dummy_model_creator import create_dummy_model
from models_core.generation import generate
from models_llama.llama3 import FAMILY
from models_llama.llama3.model import ModelConfig

WORDS = ["<unk>", "<end>", *(f"w{i}" for i in range(60))]
CONTEXT = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  config = ModelConfig(
    num_layers=2,
    vocab_size=64,
    embed_dim=16,
    hidden_dim=24,
    num_heads=4,
    head_dim=4,
    num_kv_heads=2,
    rope_theta=1e4,
    norm_eps=1e-5,
  )
  AutoModel.save_pretrained(create_dummy_model(FAMILY.model_class, config, scale=0.5), path, progress=False)
  raw = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
  (path / "config.json").write_text(json.dumps(raw))
  engine = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
  )
  engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  engine.add_special_tokens(["<end>"])
  engine.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>", "eos_token": "<end>"}))
  return load_text_model(path, progress=False)


@pytest.fixture(scope="module")
def lm(model):
  return evaluated(model, batch_size=3)


def request(kind, *arguments):
  return Instance(kind, {}, arguments, 0)


def log_probs(model, ids):
  """Of each token but the first, in a pass without a cache."""
  logits = np.asarray(model.model([ids])[0][0], np.float64)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return logits[np.arange(len(ids) - 1), ids[1:]]


def test_log_likelihoods(model, lm):
  pairs = [("w1 w2", " w3"), ("w4", " w5 w6 w7"), ("", "w8 w9"), ("w1 w2 w3 w4", " w3"), ("w7 " * 60, "w8")]
  found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
  for (before, after), (value, greedy) in zip(pairs, found, strict=True):
    ids = [1] * (not before) + model.tokenizer.encode(before + after)
    count = len(after.split())
    ids = ids[-CONTEXT:]
    assert value == pytest.approx(log_probs(model, ids)[-count:].sum(), abs=1e-4)
    answer = generate(model.model, [ids[:-count]], max_new_tokens=count).tokens[0].tolist()
    assert greedy == (answer == ids[-count:])


def test_whole_texts_in_windows(model, lm):
  text = " ".join(f"w{i % 60}" for i in range(100))
  (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
  ids, total, size = [1, *model.tokenizer.encode(text)], 0.0, CONTEXT - 1
  total += log_probs(model, ids[: size + 1]).sum()
  for end in (2 * size, 100):
    count = min(size, end - (end - 1) // size * size)
    total += log_probs(model, ids[end + 1 - size - 1 : end + 1])[-count:].sum()
  assert found == pytest.approx(total, abs=1e-3)


def test_answers_end_at_stop_strings(model, lm):
  whole = model.generate("w1 w2", max_new_tokens=12)
  stop = whole.split()[4]
  kinds = {"until": [stop, "</s>", "☃"], "max_gen_toks": 12, "do_sample": False}
  requests = [request("generate_until", text, kinds) for text in ("w1 w2", "w3", "w4 w5 w6", "w7 " * 60)]
  found = lm.generate_until(requests)
  assert found[0] == whole[: whole.index(stop)]
  assert len(found) == 4


def test_a_task_from_start_to_end(lm, tmp_path):
  rows = [
    {"question": f"w{i}", "choices": [f"w{j}" for j in (i, i + 1, i + 2)], "answer": 1} for i in range(7)
  ]
  (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
  task = {
    "task": "toy",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.json")}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
  }
  result = simple_evaluate(
    lm, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, verbosity="ERROR"
  )
  assert 0 <= result["results"]["toy"]["acc,none"] <= 1
  assert result["n-samples"]["toy"]["effective"] == 7
