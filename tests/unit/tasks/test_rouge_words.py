"""ROUGE of any script: English as rouge_score has it, and every other text like itself."""
# ruff: noqa: RUF001

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from tsqlora_scale.tasks.metrics import compute_metrics
from tsqlora_scale.tasks.rouge_words import UnicodeWords

RNG = np.random.default_rng(0)
ASCII = [
    "The cats are sitting on mats.",
    "A dull film",
    "Don't re-use e-mails; it's 3.5% (U.S.A.) under_score \t CAPS running runs",
    "",
    "?!",
    "a\nb",
    "\x00 x",
]


def test_english_is_what_it_was_to_the_bit() -> None:
    """Texts of ASCII have the words of rouge_score's tokenizer, which the published numbers are of."""
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    ours = UnicodeWords()
    characters = [chr(code) for code in range(128)]
    texts = [*ASCII, *("".join(RNG.choice(characters, 40)) for _ in range(200))]
    for text in texts:
        assert ours.tokenize(text) == scorer._tokenizer.tokenize(text), text
        assert ours.tokenize(f"{text} \u2013")[: len(ours.tokenize(text))] == ours.tokenize(text)  # beside a dash
    for text, target in zip(ASCII, reversed(ASCII), strict=True):
        expected = {name: score.fmeasure for name, score in scorer.score(target, text).items()}
        assert compute_metrics(names, [text], [target]) == expected


LANGUAGES = {
    "Russian": "Съешь же ещё этих мягких булок",
    "Greek": "Η ταινία είναι πολύ καλή",
    "German": "Schöne Grüße und große Straßen",
    "Chinese": "今天天气很好，我们去看电影。",
    "Japanese": "コーヒーを飲みながら映画を見た。",
    "Korean": "영화가 아주 좋았다",
    "Thai": "ภาพยนตร์เรื่องนี้ดีมาก",
    "Hindi": "यह फ़िल्म बहुत अच्छी है",
    "Arabic": "الفيلم جيد جدًا",
    "Persian": "من می\u200cخواهم فیلم ببینم",
    "Hebrew": "הסרט טוב מאוד",
    "Khmer": "ភាពយន្តនេះល្អណាស់",
    "Georgian": "ფილმი ძალიან კარგია",
    "Amharic": "ፊልሙ በጣም ጥሩ ነው",
    "emoji": "👍🏽 👨\u200d👩\u200d👧 ❤️ 🇩🇪",
    "symbols": "∑ ∫ …",
    "mixed": "GPT-4 сказал: 你好 ok",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_of_any_script_is_like_itself_and_like_no_other(language: str) -> None:
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    text = LANGUAGES[language]
    assert compute_metrics(names, [text], [text]) == dict.fromkeys(names, 1.0)
    assert compute_metrics(names, [text.upper()], [text]) == dict.fromkeys(names, 1.0)
    for other in ("", "film", *(t for name, t in LANGUAGES.items() if name not in (language, "mixed", "Japanese"))):
        if language not in ("mixed", "Japanese"):
            assert compute_metrics(["rouge1"], [other], [text]) == {"rouge1": 0.0}, other
    half = text[: len(text) // 2]
    if len(UnicodeWords().tokenize(text)) > 2 and language != "Hindi":
        assert 0 < compute_metrics(["rouge1"], [half], [text])["rouge1"] < 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("größe", ["grösse"]),
        ("grüße", ["grüsse"]),
        ("STRASSE straße", ["strass", "strass"]),  # of a-z once folded, so stemmed, both
        ("cafe\u0301 caf\u00e9", ["café", "café"]),
        ("don\u2019t – “running”", ["don", "t", "run"]),  # as in don't
        ("İstanbul istanbul é", ["istanbul", "istanbul", "é"]),
        ("co\u00adop é", ["coop", "é"]),
        ("a\u200bb é", ["a", "b", "é"]),
        ("天気2023年ok", ["天", "気", "2023", "年", "ok"]),
        ("𠮷野家", ["𠮷", "野", "家"]),
        ("ดี", ["ดี"]),  # a letter and its mark
        ("👍🏽ok👍", ["👍🏽", "ok", "👍"]),
        ("Apple™ ©", ["appl"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert UnicodeWords().tokenize(text) == words


def test_other_words_are_not_the_same() -> None:
    assert compute_metrics(["rouge1"], ["größe"], ["grüße"]) == {"rouge1": 0.0}
    assert compute_metrics(["rouge1", "rougeL"], ["", "👍"], ["größe", "👎"]) == {"rouge1": 0.0, "rougeL": 0.0}
