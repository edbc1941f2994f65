"""Directories for transformers: tokenizers and what is written, without PyTorch; the model where PyTorch is installed."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import random

from flax import nnx
import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
import tokenizers

from atma_jax.checkpoints.load import load_model
from atma_jax.config import Config, DataConfig, MemoryConfig, ModelConfig, RetentionCap
from atma_jax.data.chat_template import ChatTemplate, Message
from atma_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, NamedTokenizer, train_sentencepiece
from atma_jax.errors import UserError
from atma_jax.inference.api import generate
from atma_jax.models.retention_cap import with_retention_cap
from atma_jax.pytorch import read_published, write_published
from atma_jax.pytorch.fast_tokenizer import end_of_text, tokenizer_json
from tests import local_task
from tests.data.test_tokenizers import SAMPLE, byte_level_json
from tests.small_model import lively_model

SIZES = ModelConfig(vocab_size=257, num_layers=3, width=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=20,
                    block_pattern=("local", "global"), activation_dtype="float32")
TEXTS = ["", " ", "  two", "a\nb\r\n\n\tc ", "naïve Ω 日本語", "\u2581 a\u2581", "e\u0301\u00a0\u3000",
         "\U0001f469\u200d\U0001f467", "<|endoftext|></s><unk><0x41>", "====  ---- 1234567890", "\x00\x7f\x85", "x" * 3000]

with_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
                                reason="PyTorch is not installed: pip install 'atma_jax[transformers]'")


def with_template() -> HuggingFaceTokenizer:
  """A tokenizer whose file asks for special tokens around every text, and for cutting it, none of which is done here."""
  fast = tokenizers.Tokenizer.from_str(byte_level_json())
  fast.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", fast.token_to_id("<|endoftext|>"))])
  fast.enable_truncation(5)
  return HuggingFaceTokenizer(fast.to_str())


@pytest.fixture(scope="module")
def kinds():
  """A tokenizer of every kind, by name."""
  return {"bytes": ByteTokenizer(), "sentencepiece": train_sentencepiece([SAMPLE], 400),
          "huggingface": HuggingFaceTokenizer(byte_level_json()), "template": with_template()}


def odd_texts(count: int) -> list[str]:
  """TEXTS, and random mixtures of characters that tokenizers treat in their own ways."""
  rng = random.Random(0)
  alphabets = ["  \n\t", "a b=-_", "01 9", "abc e the quick", "\u2581 a<>|/s", "é日本\u0301 x", "".join(map(chr, range(32, 127)))]
  return TEXTS + ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(60))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface", "template"])
def test_tokenizer_json_encodes_as_ours(kinds, kind):
  ours = kinds[kind]
  fast = tokenizers.Tokenizer.from_str(tokenizer_json(ours))
  fast.encode_special_tokens = True  # as split_special_tokens of tokenizer_config.json sets it
  assert fast.token_to_id(end_of_text(ours)) == ours.eot_id
  for text in odd_texts(300):
    ids = ours.encode(text).tolist()
    assert fast.encode(text).ids == ids, text
    assert fast.decode([*ids, ours.eot_id], skip_special_tokens=True) == ours.decode(ids) == text


def test_tokenizers_that_cannot_be_written(monkeypatch):
  for tokenizer, message in ((NamedTokenizer("gpt2"), "only names its tokenizer"), (NamedTokenizer("x"), "only names")):
    with pytest.raises(UserError, match=message):
      tokenizer_json(tokenizer)
  other = ByteTokenizer()
  monkeypatch.setattr(other, "encode", lambda text: np.zeros(len(text), np.int32))
  with pytest.raises(UserError, match=r"bytes tokenizer cannot be written as tokenizer\.json: ' ' would be encoded as"):
    tokenizer_json(other)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface", "template"])
def test_what_is_written_is_read_back(kinds, kind, tmp_path):
  """Model, tokenizer and fields; the same after transformers has added its own."""
  model_config = dataclasses.replace(SIZES, vocab_size=512, num_layers=2, activation_dtype="bfloat16", count_length=9,
                                     memory_reset=20, memory=MemoryConfig(max_half_life=64.0))
  model, config = lively_model(model_config), Config(model=model_config, data=DataConfig(sequence_length=32))
  write_published(tmp_path / "out", "transformers", config, model, kinds[kind], 7)
  own = {"bytes": {"atma_tokenizer.json"}, "template": {"atma_tokenizer.json"}, "sentencepiece": {"tokenizer.model"}}
  assert {path.name for path in (tmp_path / "out").iterdir()} == own.get(kind, set()) | {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_atma.py", "tokenizer.json",
    "tokenizer_config.json"}
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  classes = {node.name for node in ast.parse((tmp_path / "out" / "modeling_atma.py").read_text()).body
             if isinstance(node, ast.ClassDef)}
  assert {name.partition("modeling_atma.")[2] for name in fields["auto_map"].values()} <= classes
  assert fields["dtype"] == "float32" and fields["eos_token_id"] == kinds[kind].eot_id
  (tmp_path / "out" / "config.json").write_text(json.dumps(fields | {"transformers_version": "5", "use_cache": True}))
  loaded = load_model(tmp_path / "out")
  assert loaded.config.model == model_config and loaded.tokenizer.fingerprint == kinds[kind].fingerprint
  for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(loaded.model)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_sentencepiece([SAMPLE], 400)])
def test_the_chat_template_goes_along(make, tmp_path):
  """What transformers renders and encodes is the prompt of a conversation, and the template is read back."""
  tokenizer, model_config = make(), dataclasses.replace(SIZES, vocab_size=512, num_layers=2)
  tokenizer.chat_template = ChatTemplate()
  config = Config(model=model_config, data=DataConfig(sequence_length=32))
  write_published(tmp_path / "out", "transformers", config, lively_model(model_config), tokenizer, 7)
  written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
  messages = [Message("user", "the quick"), Message("assistant", "brown"), Message("user", "fox")]
  text = jinja2.Environment().from_string(written["chat_template"]).render(
    messages=[message._asdict() for message in messages], eos_token=written["eos_token"], add_generation_prompt=True)
  fast = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
  fast.encode_special_tokens = written["split_special_tokens"]
  assert fast.encode(text).ids == tokenizer.chat_template.prompt(messages, tokenizer).tolist()
  assert load_model(tmp_path / "out").tokenizer.chat_template == tokenizer.chat_template


def test_what_cannot_be_exported(kinds, tmp_path):
  raven = dataclasses.replace(SIZES, block_pattern=("local", "raven"))
  for model_config, kind, message in ((raven, "bytes", "modeling_atma.py has no raven blocks; legal: local, global"),
                                      (SIZES, "sentencepiece", "tokenizer has .* ids; legal: 1 to config.model.vocab_size=257")):
    with pytest.raises(UserError, match=message):
      write_published(tmp_path / "out", "transformers", Config(model=model_config), lively_model(model_config), kinds[kind], 1)
  capped = with_retention_cap(lively_model(SIZES), RetentionCap(tokens=9.0, heads="all"))
  with pytest.raises(UserError, match="retention cap"):
    write_published(tmp_path / "out", "transformers", Config(model=SIZES), capped, ByteTokenizer(), 1)
  assert not list(tmp_path.iterdir())


def test_the_weights_have_a_digest(tmp_path):
  write_published(tmp_path / "out", "transformers", Config(model=SIZES), lively_model(SIZES), ByteTokenizer(), 1)
  path = tmp_path / "out" / "model.safetensors"
  content = bytearray(path.read_bytes())
  content[-5] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"model\.safetensors: damaged: the digest of its tensors differs"):
    read_published(tmp_path / "out")


# --- With PyTorch -------------------------------------------------------------------------------------------------------

CASES = [
  {"attention": "polar"}, {"attention": "polar", "memory": MemoryConfig(enabled=False), "window": 7},
  {"attention": "nope", "window": 1}, {"attention": "nope", "memory": MemoryConfig(enabled=False), "num_kv_heads": 4},
  {"attention": "rope", "window": 5}, {"attention": "rope", "memory": MemoryConfig(enabled=False)},
  {"null_length": 11, "count_length": 9, "direction_scale": 4.0, "memory": MemoryConfig(max_half_life=30.0), "window": 40},
  {"memory_reset": 13, "logit_cap": 30.0, "conv_taps": 5, "canon_taps": 2, "num_kv_heads": 1}, {"memory_off": True},
]


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
  """The library, with its folder of code in the temporary one."""
  import transformers
  monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  return transformers


@with_torch
@pytest.mark.parametrize("fields", CASES, ids=lambda fields: ",".join(fields))
def test_logits_are_ours(hugging_face, tmp_path, fields):
  """Of the full pass, of a cached one in pieces, and of rows with padding before them."""
  import torch
  model_config = dataclasses.replace(SIZES, **fields)
  model, tokens = lively_model(model_config), np.random.default_rng(0).integers(0, 257, (2, 150))
  write_published(tmp_path / "out", "transformers", Config(model=model_config), model, ByteTokenizer(), 1)
  theirs = hugging_face.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
  expected, cache, pieces = np.asarray(model(jnp.asarray(tokens))), None, []
  padded, mask = torch.tensor(np.stack([tokens[0], np.roll(tokens[1], 60)])), torch.ones(2, 150, dtype=torch.long)
  mask[1, :60] = 0
  with torch.no_grad():
    full = theirs(torch.tensor(tokens)).logits
    for start, stop in ((0, 1), (1, 70), (70, 71), (71, 150)):
      output = theirs(torch.tensor(tokens[:, start:stop]), past_key_values=cache, use_cache=True)
      cache = output.past_key_values
      pieces.append(output.logits)
    aside = theirs(padded, attention_mask=mask).logits
  assert full.dtype == torch.float32 and cache.get_seq_length() == 150
  for found, wanted in ((full, expected), (torch.cat(pieces, 1), expected), (aside[0], expected[0]),
                        (aside[1, 60:], expected[1, :90])):
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)


@pytest.fixture
def pair(hugging_face, tmp_path):
  """A model, its export's folder, and the model and tokenizer that transformers loads from it."""
  model = lively_model(SIZES)
  config = Config(model=SIZES, data=DataConfig(sequence_length=32))
  write_published(tmp_path / "out", "transformers", config, model, ByteTokenizer(), 1)
  load = {"pretrained_model_name_or_path": tmp_path / "out", "trust_remote_code": True}
  return (model, tmp_path / "out", hugging_face.AutoModelForCausalLM.from_pretrained(**load),
          hugging_face.AutoTokenizer.from_pretrained(**load))


@with_torch
def test_generation_is_ours(pair):
  """Greedy, in a batch that is padded, and with beams, with and without a cache."""
  model, _, theirs, tokenizer = pair
  prompts = ["hello", "def main(argv):\n  return", " é"]
  batch = tokenizer(prompts, return_tensors="pt", padding=True)
  new = theirs.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch.input_ids.shape[1]:]
  texts = [tokenizer.decode(row, skip_special_tokens=True) for row in new]
  assert texts == generate(model, prompts, tokenizer=ByteTokenizer(), max_tokens=20, temperature=0)
  beams = [theirs.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=3, use_cache=cached) for cached in (True, False)]
  assert beams[0].tolist() == beams[1].tolist()
  with pytest.raises(ValueError, match="stand together"):
    theirs(batch.input_ids, attention_mask=batch.input_ids % 2)


@with_torch
def test_saved_by_transformers_and_trained(pair, tmp_path):
  """What transformers saves is read here, and every parameter has a gradient."""
  import torch
  model, _, theirs, tokenizer = pair
  tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
  theirs(tokens, labels=tokens).loss.backward()
  assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in theirs.parameters())
  for saved in (theirs, tokenizer):
    saved.save_pretrained(tmp_path / "saved")
  loaded = load_model(tmp_path / "saved")
  assert loaded.config.model == SIZES
  for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(loaded.model)), strict=True):
    np.testing.assert_array_equal(a, b)


@with_torch
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface", "template"])
def test_auto_tokenizer_is_ours(hugging_face, kinds, kind, tmp_path):
  ours = kinds[kind]
  model_config = dataclasses.replace(SIZES, vocab_size=512, num_layers=1)
  write_published(tmp_path / "out", "transformers", Config(model=model_config), lively_model(model_config), ours, 1)
  theirs = hugging_face.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
  assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eot_id
  for text in odd_texts(100):
    ids = ours.encode(text).tolist()
    assert theirs(text).input_ids == ids and theirs.decode([*ids, ours.eot_id], skip_special_tokens=True) == text


@with_torch
def test_the_harness_scores_both_alike(pair, tmp_path, monkeypatch):
  """A local task of the lm-evaluation-harness: its own model ``hf``, and ours."""
  pytest.importorskip("lm_eval.models.huggingface")
  import atma_jax.evaluation.lm_eval_adapter  # registers the model  # noqa: F401

  folder, found = pair[1], {}
  for name, arguments in (("atma_jax", {"checkpoint": str(folder)}),
                          ("hf", {"pretrained": str(folder), "trust_remote_code": True, "add_bos_token": True, "device": "cpu"})):
    found[name] = local_task.evaluate(tmp_path, monkeypatch, model=name, model_args=arguments, batch_size=2)
  np.testing.assert_allclose(found["hf"][0], found["atma_jax"][0], rtol=2e-5)
  assert found["hf"][1] == found["atma_jax"][1]


@with_torch
def test_a_fresh_model_starts_as_ours(pair, hugging_face):
  """Output projections and the head are zero; the rest has variance 1 / fan-in."""
  fresh = hugging_face.AutoModelForCausalLM.from_config(pair[2].config, trust_remote_code=True)
  spread = {name: parameter.std().item() for name, parameter in fresh.named_parameters() if name.endswith("weight")}
  zero = {name for name, value in spread.items() if value == 0 and "norm" not in name}
  assert zero == {name for name in spread if name.split(".")[-2] in ("proj", "out_proj", "mu_proj")}
  np.testing.assert_allclose([spread["blocks.1.attn.q.weight"], spread["blocks.1.mlp.fc.weight"]], 24**-0.5, rtol=0.1)
