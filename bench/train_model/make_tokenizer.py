"""Build the bundled model's tokenizer: byte-level BPE over the words of the synthetic world.

Invented words are made of known pieces, which are trained as words of their own, so that every invented word is
two or three tokens; held-out real words are kept out and fall apart into smaller tokens, as a user's words do.
Run: python bench/train_model/make_tokenizer.py
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from amem.bench import vocabulary as vocab
from amem.bench.scene import held_out
from amem.bench.world import UNKNOWN
from amem.text import PREAMBLE

SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] | trim"
    " + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DEMO = Path(__file__).parents[2] / "amem" / "models" / "demo"
LETTER_PAIRS = tuple(a + b for a in string.ascii_lowercase for b in "aeioulnrst")
COMMON = """the of and to in is was he for it with as his on be at by had are but from or have an they which one you
were her all she there would their we him been has when who will no more if out so said what up its about into than
them can only other time new some could these two may first then do any like my now over such our man me even most
made after also did many before must years where much your way well should because each just those people how too
little state good very make still see work long get here between both under never day same another know year while
last might us great old go come since against right came take used himself few house during without again place
around however home small found thought went say part once""".split()


def corpus() -> Iterator[str]:
    """Lines of words; a piece stands alone on its line where it never begins a word."""
    for piece in vocab.FIRST_PIECES:
        yield from [f" {piece} {piece.lower()}"] * 3000
    for piece in vocab.LAST_PIECES:
        yield from [piece] * 3000
        yield from [piece[:2]] * 12000
    for words in (vocab.NAMES, *vocab.VALUES.values()):
        for word in words:
            if not held_out(word):
                yield from [f" {word}"] * 400
    wordings = [PREAMBLE, UNKNOWN, *vocab.KINSHIP, *vocab.FILLERS, *vocab.SYSTEM_TEXTS]
    wordings += [*vocab.SPEAKER_INTRO, *vocab.PRONOUN_INTRO, *vocab.ALIAS_INTRO, *vocab.CORRECTION]
    for attribute in vocab.ATTRIBUTES.values():
        for field in fields(attribute)[1:]:
            wordings += getattr(attribute, field.name)
    for line in wordings:
        plain = line
        for hole in ("{n}", "{v}", "{a}", "{new}", "{old}"):
            plain = plain.replace(hole, "")
        yield from [" " + plain] * 200
    yield from [" Alice's sister don't I'm we're you've they'll he'd"] * 400
    yield from [" " + " ".join(COMMON)] * 60
    yield from [" ".join(LETTER_PAIRS)] * 30
    yield from [f" {a}{b}" for a in string.ascii_uppercase for b in "aeiou"] * 20


def build(vocabulary_size: int = 2048) -> Tokenizer:
    """A trained tokenizer whose first ids are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def save(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    build().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    save(DEMO)
