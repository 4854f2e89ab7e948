r"""Answers as text: what is around them taken off, and words compared as words.

math-verify multiplies the letters of a word, so "tea" equals "eat" there (0.9.0).
"""

import re

_QUOTES = (("'", "'"), ('"', '"'), ("`", "'"), ("‘", "’"), ("“", "”"), ("$", "$"), (r"\(", r"\)"))
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{")
_WHOLE_WRAPPER = re.compile(_WRAPPER.pattern + r"([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle|quad)(?![A-Za-z])|~|\s")
_LATEX_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_NO_WORD = re.compile(
    "and|arccos|arcsin|arctan|cos|cosh|cot|csc|det|exp|gcd|inf|infty|lcm|lim|log|max|min|mod|pmod"
    "|sec|sin|sinh|sqrt|tan|tanh",
    re.IGNORECASE,
)
_PUNCTUATION = re.compile(r"[\s{}_$.,;:!?\"'`]+")
_ARTICLE = re.compile(r"^(?:the|an|a) ")


def unwrap(answer: str) -> str:
    r"""The answer without spaces, quotes, dollar signs or `\text{...}` around the whole of it.

    The reference's prompts ask for ``\boxed{'The final answer goes here.'}``, quotes included.
    """
    text = answer.strip()
    while True:
        inner = _without_one_layer(text).strip()
        if inner == text or not inner:
            return text
        text = inner


def _without_one_layer(text: str) -> str:
    match = _WHOLE_WRAPPER.fullmatch(text)
    if match:
        return match[1]
    for opening, closing in _QUOTES:
        is_long_enough = len(text) > len(opening) + len(closing)
        if is_long_enough and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if opening not in inner and closing not in inner:
                return inner
    return text


def without_spacing(text: str) -> str:
    """The text without spaces of any kind, for a first comparison."""
    return _SPACING.sub("", re.sub(r"\\[dt]frac", r"\\frac", text))


def is_words(text: str) -> bool:
    r"""Whether a right answer is given in words: it has one of three letters or more that is
    neither a LaTeX command, nor a function's name, nor "and"."""
    plain = _LATEX_COMMAND.sub(" ", _WRAPPER.sub(" ", text))
    return any(not _NO_WORD.fullmatch(word) for word in _WORD.findall(plain))


def normalised_words(text: str) -> str:
    """The text in lower case, without markup, punctuation, or an article at its beginning."""
    plain = re.sub(r"\\[,;:! ]|~", " ", _WRAPPER.sub(" ", text))
    words = _PUNCTUATION.sub(" ", plain.replace("_", "")).strip().casefold()
    return _ARTICLE.sub("", words)
