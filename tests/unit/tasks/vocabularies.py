"""Small tokenizers of every kind, trained on a few sentences, with the marks that real ones have."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import WORDS, tiny_tokenizer

SENTENCES = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] + [
    "Ünïcode, 1234 (brackets) <tags> |bars|"
] * 4
MARKS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "[SEP]", "<|im_end|>", "<eos>"]


def _finished(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    ids = [(mark, tokenizer.token_to_id(mark)) for mark in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ids
    )
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=["[SEP]", "<|im_end|>", "<eos>"], **named,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def words() -> PreTrainedTokenizerFast:
    """Word-level over blanks: a mark between blanks is a word of the vocabulary."""
    vocab = {word: i for i, word in enumerate(MARKS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer, unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=MARKS))
    tokenizer.decoder = decoders.WordPiece()
    return _finished(tokenizer, unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=MARKS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finished(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: its marks are pieces, which its model finds in any text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=150, special_tokens=MARKS, unk_token="<unk>")
    )
    return _finished(tokenizer, unk_token="<unk>")


def whole_text_bpe() -> PreTrainedTokenizerFast:
    """As Llama-2's: no pre-tokenizer, so merges run over the whole text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=MARKS))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    return _finished(tokenizer, unk_token="<unk>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    made.__name__: made for made in (words, wordpiece, byte_level, unigram, whole_text_bpe)
}


def dropping() -> PreTrainedTokenizerFast:
    """A tokenizer that drops characters which cannot be seen, as most do."""
    made = tiny_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"[\u200b-\u200d\u2060\ufeff\u00ad]"), "")
    return made
