"""The bundled directory is a Hugging Face checkpoint that loads, with the prompt format the server builds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import amem
from amem.text import PREAMBLE

DEMO = Path(amem.__file__).parent / "models" / "demo"
SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(DEMO)


def test_shape_and_size(model: LlamaForCausalLM) -> None:
    config = model.config
    assert config.num_hidden_layers >= 12
    assert config.max_position_embeddings == 4096
    assert config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert sum(f.stat().st_size for f in DEMO.iterdir()) <= 12 * 2**20


def test_logits_are_finite_over_a_long_context(model: LlamaForCausalLM, tokenizer: object) -> None:
    ids = torch.randint(6, len(tokenizer), (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (1, 512, model.config.vocab_size)
    assert math.isfinite(float(logits.abs().max()))


def test_special_tokens_have_the_first_ids(tokenizer: object) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(6))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 5)


def test_chat_template_is_the_prompt_format(tokenizer: object) -> None:
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "Where does Alice live?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|> Be brief.<|end|><|user|> Where does Alice live?<|end|><|assistant|>"


@pytest.mark.parametrize("text", ["Zürich \U0001f600 naïve\x00\x7f", "日本語 العربية", "<|end", PREAMBLE])
def test_any_text_survives_the_tokenizer(tokenizer: object, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_of_a_memory_are_the_tokens_of_the_answer(tokenizer: object) -> None:
    memory = tokenizer.encode("- Alice lives in Seattle and works at Boeing.\n", add_special_tokens=False)
    for word in (" Alice", " Seattle", " Boeing"):
        (one,) = tokenizer.encode(word, add_special_tokens=False)
        assert one in memory
