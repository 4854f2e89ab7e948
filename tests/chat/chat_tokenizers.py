"""Small tokenizers with the two kinds of chat template that matter: one that leaves history alone,
and one that, like stock hybrid Qwen3, gives only the last assistant turn an empty think block."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sod_mcore.trajectory import Message

DELIMITERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "code_interpreter",
            "description": "Runs Python.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string"}},
                "required": ["code"],
            },
        },
    }
]

# The pre-tokenizer of Qwen2 and Qwen3 (a fact of the format): blanks and line breaks can merge with
# what follows them, so that a careless cut changes ids.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CALLS = """
{%- macro calls(message) %}
{%- for call in message.tool_calls or [] %}
{{- '\n' if message.content or not loop.first }}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}
{%- endmacro %}
{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
"""

_TOOL = """
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"""

PLAIN_TEMPLATE = (
    _CALLS
    + """
{%- for message in messages %}{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' + message.content + calls(message) + '<|im_end|>\n' }}"""
    + _TOOL
    + "{% endif %}"
)

HYBRID_TEMPLATE = (
    _CALLS
    + """
{%- for message in messages %}{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- if message.reasoning_content or loop.last %}
{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}
{{- message.content + calls(message) + '<|im_end|>\n' }}"""
    + _TOOL
    + """
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
)

_TEXTS = [
    "user\nassistant\nsystem\nCalculate 57 + 87 - 70.\n",
    '\n{"name": "code_interpreter", "arguments": {"code": "print(57 + 87)"}}\n',
    "Traceback (most recent call last):\n  File x\n\n\nNameError: name 'prnt' is not defined\n",
] * 20


def make_tokenizer(template: str) -> Any:
    """A byte-level BPE tokenizer of about 400 tokens; markup is not "special", as in Qwen3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in DELIMITERS])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def call(code: str, content: str = "", **extra: Any) -> Message:
    """An assistant turn with one call of the code interpreter."""
    function = {"name": "code_interpreter", "arguments": {"code": code}}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls, **extra}


def two_call_conversation(**extra: Any) -> list[Message]:
    """User, failing call, traceback, repaired call, output, answer."""
    traceback = "Traceback (most recent call last):\n  File x\nSyntaxError: '(' was never closed\n"
    return [
        {"role": "user", "content": "Calculate 57 + 87."},
        call("print(57 + 87", **extra),
        {"role": "tool", "content": traceback},
        call("print(57 + 87)", "Again:", **extra),
        {"role": "tool", "content": "\n144\n"},
        {"role": "assistant", "content": "\\boxed{144}", **extra},
    ]


def one_shot_ids(tokenizer: Any, messages: list[Message], **options: Any) -> list[int]:
    """The template's own rendering of the whole conversation, up to the last end of turn."""
    text = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, **options)
    return list(tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"])
