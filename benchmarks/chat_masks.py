#!/usr/bin/env python3
"""What is learned of a conversation, beside what TRL's SFTTrainer learns with ``assistant_only_loss``.

    pip install trl
    python benchmarks/chat_masks.py --templates tests/unit/tasks/chat_templates

TRL judges: its trainer is given conversations and tells its labels. It takes generation marks from the templates of
public models that it knows (``trl/chat_templates``, which it patches itself) and from those of a folder, whose
``NAME.marked.jinja`` has them. Ours takes no marks: it is given the models' own templates, and once more those that TRL
has made of them, as these may write a turn otherwise. Tokenizers are trained here, each
with the marks of its template as special tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from tsqlora_scale.config.schema import TaskConfig  # noqa: E402
from tsqlora_scale.tasks.objectives.conversation_tokens import ConversationTokens  # noqa: E402

MARKS = "<\\|[\\w ]+\\|>|<\uff5c[^\uff5c<>]+\uff5c>|</?(?:start|end)_of_turn>|\\[/?INST\\]"
SENTENCES = ["Is the film good? It was dull, and the plot was weak.", "You are a very good director of 1234 films."]
TASK = TaskConfig.model_validate(
    {"type": "causal", "messages": "messages", "dataset": {"train_file": "none"}, "metrics": ["loss"]}
)
#: What is said where TRL learns a part of what asks for an answer, too, which ours takes for the prompt's.
BUT = "but for a part of what asks for it"
TURNS = {
    "one exchange": [("user", "Is the film good?"), ("assistant", "It was dull.")],
    "three": [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5"), ("assistant", "6")],
    "texts like roles": [("user", "a"), ("assistant", "user"), ("user", "assistant"), ("assistant", "a")],
    "lines": [("user", "two\n\nlines"), ("assistant", "one (more)\n1234"), ("user", "?"), ("assistant", "And so on")],
    "a system prompt": [("system", "You are good."), ("user", "the film"), ("assistant", "the film")],
}  # fmt: skip


def pairs(folder: Path | None) -> Iterator[tuple[str, str, str | None]]:
    """Names, the models' own templates, and those with marks where TRL does not make them itself."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        raise SystemExit("needs TRL: pip install trl")
    for path in sorted((Path(spec.origin).parent / "chat_templates").glob("*_training.jinja")):
        own = path.with_name(path.name.replace("_training", ""))
        if own.exists():
            yield f"TRL's {own.stem}", own.read_text(encoding="utf-8"), None
    for path in sorted(folder.glob("*.marked.jinja")) if folder is not None else ():
        own = path.with_name(path.name.replace(".marked", ""))
        yield own.stem, own.read_text(encoding="utf-8"), path.read_text(encoding="utf-8")


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """Bytes, some words, and the marks of a template."""
    found = list(dict.fromkeys(re.findall(MARKS, template)))
    end = next(
        (mark for mark in found if re.search("im_end|eot_id|end_of_turn|END_OF_TURN|endoftext|<\uff5cend", mark)),
        "</s>",
    )
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    marks = dict.fromkeys(["<s>", end, "<pad>", *found])
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=end, pad_token="<pad>")


def learned_by_trl(tokenizer: PreTrainedTokenizerFast, row: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids and what is learned of a conversation, as the trainer has prepared it."""
    from trl import SFTConfig, SFTTrainer

    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        options: Any = {"output_dir": folder, "assistant_only_loss": True, "max_length": None, "report_to": "none"}
        prepared = SFTTrainer(
            model=model,
            args=SFTConfig(use_cpu=True, bf16=False, disable_tqdm=True, **options),
            train_dataset=datasets.Dataset.from_list([{"messages": row}]),
            processing_class=tokenizer,
        ).train_dataset[0]
    if "labels" in prepared:
        return list(prepared["input_ids"]), [label != -100 for label in prepared["labels"]]
    return list(prepared["input_ids"]), [bool(mask) for mask in prepared["assistant_masks"]]


def compare(template: str, marked: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """What is said of every conversation: that both learn the same, or what they differ in. First ours is given the
    model's own template, then the one that TRL makes of it."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = tokenizer_of(marked or template)
    rows = {name: [{"role": role, "content": content} for role, content in turns] for name, turns in TURNS.items()}
    tokenizer.chat_template = marked or template
    patched = get_training_chat_template(tokenizer) or tokenizer.chat_template
    judged = {name: _attempt("TRL", partial(learned_by_trl, tokenizer, row)) for name, row in rows.items()}
    return _said(tokenizer, template, rows, judged), _said(tokenizer, patched, rows, judged)


def _said(
    tokenizer: PreTrainedTokenizerFast, template: str, rows: dict[str, list[dict[str, str]]], judged: dict[str, Any]
) -> dict[str, str]:
    tokenizer.chat_template = template
    question: Any = [{"role": "user", "content": "?"}]
    asked = _attempt("", partial(tokenizer.apply_chat_template, question, tokenize=False, add_generation_prompt=True))
    asks = str(asked).rpartition("?")[2]
    tokens = _attempt("ours", partial(ConversationTokens, tokenizer, TASK))
    found = {}
    for name, row in rows.items():
        ours = tokens
        if not isinstance(ours, str):
            ours = _attempt("ours", partial(tokens.marked, row, None, 10_000, 1))
        found[name] = next((text for text in (ours, judged[name]) if isinstance(text, str)), "")
        found[name] = found[name] or _difference(tokenizer, asks, ours.ids, ours.learned, *judged[name])
    return found


def _attempt(whose: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # of a template's or the trainer's own
        return f"not {whose} ({_line(error)})"


def _difference(
    tokenizer: PreTrainedTokenizerFast,
    asks: str,
    ours: list[int],
    we_learn: list[bool],
    theirs: list[int],
    they_learn: list[bool],
) -> str:
    """What two masks differ in.

    Args:
        asks: what the template asks for an answer by.
    """
    if ours != theirs:
        return f"other text: ours {_text(tokenizer, ours)}, TRL's {_text(tokenizer, theirs)}"
    if we_learn == they_learn:
        return "same"
    places = [i for i, (we, they) in enumerate(zip(we_learn, they_learn, strict=True)) if they and not we]
    only_we = [i for i, we, they in zip(ours, we_learn, they_learn, strict=True) if we and not they]
    runs = [
        str(tokenizer.decode([ours[i] for _, i in run])) for _, run in groupby(enumerate(places), lambda p: p[1] - p[0])
    ]
    if not only_we and all(run in asks for run in runs):
        return f"{BUT} ({_shown(runs[0])})"
    return f"only TRL learns {_shown(' ... '.join(runs))}, only ours {_text(tokenizer, only_we)}"


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return _shown(str(tokenizer.decode(ids)))


def _shown(text: str) -> str:
    text = repr(text).replace("|", "/")
    return text if len(text) < 160 else f"{text[:80]} ... {text[-60:]}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120].replace("|", "/") or type(error).__name__


def main() -> None:
    """One line a template."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, help="a folder of NAME.jinja and NAME.marked.jinja")
    parser.add_argument("--only", default="", help="a regular expression of names")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    print("| template | the same by the model's own | the same by TRL's | others |")
    print("|---|---|---|---|")
    for name, template, marked in pairs(options.templates):
        if not re.search(options.only, name):
            continue
        own, patched = compare(template, marked)
        both = [*own.items(), *patched.items()]
        others = dict.fromkeys(
            text if text.startswith(BUT) else f"{key}: {text}" for key, text in both if text != "same"
        )
        counts = [_count(found) for found in (own, patched)]
        print(f"| {name} | {' | '.join(counts)} | {'; '.join(others)} |", flush=True)


def _count(found: dict[str, str]) -> str:
    same, nearly = list(found.values()).count("same"), sum(text.startswith(BUT) for text in found.values())
    return f"{same} of {len(found)}" + (f", {nearly} {BUT}" if nearly else "")


if __name__ == "__main__":
    main()
