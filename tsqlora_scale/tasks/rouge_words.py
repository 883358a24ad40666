"""The words that ROUGE counts, in any script.

``rouge_score``'s own tokenizer keeps a-z and 0-9 alone: a Russian or Chinese text has no words for it, and of
``größe`` it keeps ``gr`` and ``e``. This one gives a text of ASCII exactly the words of that tokenizer, so that
published English numbers stay comparable, and every other text its own.
"""

from __future__ import annotations

import unicodedata

import regex
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

#: Scripts that put no blanks between words; every character of theirs, with its marks, counts as a word.
_WITHOUT_BLANKS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Tham}"
#: Characters of those scripts; pictures, with all that joins them or colours them; flags; runs of letters, marks and
#: digits. Punctuation and symbols only separate, as in the tokenizer for English.
_WORD = regex.compile(
    rf"""
      [{_WITHOUT_BLANKS}]\p{{M}}*
    | \p{{RI}}{{2}}
    | (?:\p{{Emoji_Presentation}}|\p{{Extended_Pictographic}}\uFE0F)\p{{EMod}}?\uFE0F?
        (?:\u200D\p{{Extended_Pictographic}}\p{{EMod}}?\uFE0F?)*
    | (?:(?![{_WITHOUT_BLANKS}])[\p{{L}}\p{{M}}\p{{N}}])+
    """,
    regex.VERBOSE,
)
#: Characters that are not seen (soft hyphens, joiners, marks of direction): they end no word (Unicode's annex 29,
#: rule WB4). The zero-width space does; in pictures the joiner stays.
_UNSEEN = regex.compile(r"(?<!\p{Extended_Pictographic}[\p{EMod}\uFE0F]*)\u200D|[\p{Cf}--[\u200B\u200D]]", regex.V1)


class UnicodeWords(Tokenizer):
    """Words of any script, for ``RougeScorer(tokenizer=...)``.

    Text is composed (NFC) and case-folded. A word of a-z and 0-9 is then stemmed by Porter's algorithm, as in
    English; words with any other letter are left whole. A text that has no word at all, but other symbols than those
    of ASCII, counts by its symbols.
    """

    def __init__(self) -> None:
        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in order."""
        if text.isascii():
            english: list[str] = self._english.tokenize(text)
            return english
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
        folded = _UNSEEN.sub("", folded.replace("i\u0307", "i"))  # what a Turkish capital i folds to
        words: list[str] = []
        for word in _WORD.findall(folded):
            words += self._english.tokenize(word) if word.isascii() else [word]
        return words or [symbol for symbol in folded if not symbol.isspace()]
