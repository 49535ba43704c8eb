"""The two tokenizers, trained on captions: byte-level BPE as CLIP has it, unigram as T5 has it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

CLIP_VOCABULARY, T5_VOCABULARY = 900, 400
CLIP_LENGTH = 77
T5_MARKS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
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
    """Unigram over lower-cased text; all printable ASCII is in the vocabulary, the rest becomes `<unk>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_VOCABULARY,
        special_tokens=list(T5_MARKS.values()),
        unk_token=T5_MARKS["unk_token"],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, **T5_MARKS)
