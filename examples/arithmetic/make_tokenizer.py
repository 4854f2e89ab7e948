"""Trains the tokenizer of the arithmetic example and saves it as a Hugging Face folder.

    python -m examples.arithmetic.make_tokenizer --data runs/arithmetic/data \\
        --output runs/arithmetic/tokenizer

It is byte-level BPE like Qwen's, with another pre-tokenizer: a number of up to three digits is one
token, a binary operator with its blanks is one token, and the boilerplate of a call is one token.
Both teacher and student use it; they must share ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from examples.arithmetic.command_line import load_settings, make_parser
from examples.arithmetic.settings import TokenizerSettings
from sod_mcore.data import Conversation, read_conversations
from sod_mcore.files import atomic_folder

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

_SIGN = r" [+*-] (?=[\d-])|-(?=\d)"
_FUNCTION = r"[A-Za-z]+\("
SPLIT = "|".join(
    [
        r"^(?:system|user|assistant)\n",  # ends at the header, so that turns can be encoded apart
        r"\p{N}{1,3}",
        _SIGN,
        _FUNCTION,
        rf"(?:(?!{_SIGN}|{_FUNCTION})[^\p{{N}}])+",
    ]
)
"""Cuts text into the pieces inside which BPE may merge."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tokenizer unless it exists."""
    parser = make_parser(str(__doc__), "folder that receives the tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="output of make_data")
    options = parser.parse_args(arguments)
    settings = load_settings(options).tokenizer
    if options.output.exists():
        print(f"{options.output} exists; nothing to do")
        return
    conversations = read_conversations(options.data / "sft_student.parquet")
    with atomic_folder(options.output) as folder:
        train_tokenizer(conversations, settings).save_pretrained(folder)


def train_tokenizer(
    conversations: Sequence[Conversation], settings: TokenizerSettings
) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template, trained on rendered conversations and on numbers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_training_texts(conversations, settings.number_weight), trainer)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (END_OF_TEXT, TURN_START, TURN_END)]
    )
    # Not "special", as in Qwen: decoding shows them, and the call parser reads them.
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    return _with_template(backend)


def _with_template(backend: Tokenizer) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=TURN_END, pad_token=END_OF_TEXT
    )
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    return tokenizer


def _training_texts(conversations: Iterable[Conversation], number_weight: int) -> Iterator[str]:
    """Rendered conversations without their control tokens, then every number ``number_weight``
    times: 0 to 999, and the pieces of longer numbers, which may begin with zeros."""
    renderer = _with_template(Tokenizer(models.BPE()))
    control = re.compile("|".join(map(re.escape, (END_OF_TEXT, TURN_START, TURN_END, *MARKUP))))
    for conversation in tqdm(list(conversations), desc="texts"):
        text = renderer.apply_chat_template(
            list(conversation.messages), tools=list(conversation.tools) or None, tokenize=False
        )
        yield from filter(None, control.split(text))
    for width in (1, 2, 3):
        for number in range(10**width):
            for _ in range(number_weight):
                yield f"{number:0{width}d}"


if __name__ == "__main__":
    main()
