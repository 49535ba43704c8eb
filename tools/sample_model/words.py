"""The two tokenizers, trained on captions: byte-level BPE as CLIP has it, unigram as T5 has it."""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

CLIP_VOCABULARY = 900
CLIP_LENGTH = 77
T5_MARKS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
SPACE = "▁"
SPELLED = -20.0
"""Log probability of a single character: below that of any word, so that a known word is never spelled."""
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """Lower case, byte level, with a mark at the end of a word; every byte is in the vocabulary in both positions."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[START, END],
        show_progress=False,
    )
    tokenizer.train_from_iterator([caption.lower() for caption in captions], trainer)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = tokenizer.model.save(folder)
        vocabulary = msgspec.json.decode(Path(vocabulary_file).read_bytes())
        # A letter that no caption ends a word with would else be unknown there, which CLIP reads as the end of text.
        for letter in alphabet:
            vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
        Path(vocabulary_file).write_bytes(msgspec.json.encode(vocabulary))
        return CLIPTokenizer(vocab=vocabulary_file, merges=merges_file, model_max_length=CLIP_LENGTH)


def t5_tokenizer(captions: Sequence[str]) -> T5TokenizerFast:
    """Unigram: every word of the captions is one token, also capitalized or in capitals; what else is typed is spelled.

    The vocabulary is counted, not trained: a trainer prunes it down to letters, because with so few different words
    letters explain the text nearly as well. All printable ASCII is there; other characters become `<unk>`. Case is in
    the vocabulary because a T5 tokenizer does not keep a normalizer when it is saved and loaded.
    """
    words = Counter(word for caption in captions for word in WORD.findall(caption.lower()))
    total = sum(words.values())
    known = {f"{SPACE}{form}": math.log(words[word] / total) for word in sorted(words) for form in _forms(word)}
    characters = dict.fromkeys((SPACE, *map(chr, range(33, 127))), SPELLED)
    vocabulary = [*((mark, 0.0) for mark in T5_MARKS.values()), *characters.items(), *known.items()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=len(T5_MARKS) - 1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, **T5_MARKS)


def _forms(word: str) -> tuple[str, ...]:
    return (word, word.capitalize(), word.upper())
