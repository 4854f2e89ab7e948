r"""Answers as text: what is around them taken off, and words compared as words.

math-verify multiplies the letters of a word, so "tea" equals "eat" there (0.9.0).
"""

import re

_LAYERS = (
    *(("'", "'"), ('"', '"'), ("`", "'"), ("`", "`"), ("‘", "’"), ("“", "”"), ("**", "**")),
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("{", "}")),
)
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|mbox|boldsymbol|bm|underline|emph"
    r"|operatorname)\s*\{"
)
_WHOLE_WRAPPER = re.compile(_WRAPPER.pattern + r"([^{}]*)\}")
_SPACE = r"(?:\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\s)"
_SPACE_AT_ENDS = re.compile(rf"\A{_SPACE}+|(?:{_SPACE}|\\)+\Z")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle|q?quad)(?![A-Za-z])|~|\s")
_LATEX_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_LONG_WORD = re.compile(r"[^\W\d_]{4,}")
_PROSE = re.compile(rf"{_WORD.pattern}[\s,.-]+{_WORD.pattern}")
_MATHEMATICS = re.compile(r"[+*/^=<>\d]|\\[A-Za-z]|(?<![A-Za-z])-|-(?![A-Za-z])")
_BARE_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])|π")
_ROOT_SIGN = re.compile(r"√\s*(?:(\d+|[A-Za-z])|\(([^()]*)\)|\{([^{}]*)\})")
_NO_WORD = re.compile(
    r"(?<![^\W\d_])(?:and|arccos|arcsin|arctan|cos|cosh|cot|csc|det|exp|gcd|inf|infty|lcm|lim|log"
    r"|max|min|mod|pmod|sec|sin|sinh|sqrt|tan|tanh)(?![^\W\d_])",
    re.IGNORECASE,
)
_PUNCTUATION = re.compile(r"[\s{}_$.,;:!?\"'`]+")
_ARTICLE = re.compile(r"^(?:the|an|a) ")


def unwrap(answer: str) -> str:
    r"""The answer without spaces, line breaks, quotes, dollar signs or `\text{...}` around it.

    The reference's prompts ask for ``\boxed{'The final answer goes here.'}``, quotes included.
    """
    text = answer.strip()
    while True:
        inner = _without_one_layer(_SPACE_AT_ENDS.sub("", text)).strip()
        if inner == text or not inner:
            return text
        text = inner


def _without_one_layer(text: str) -> str:
    match = _WHOLE_WRAPPER.fullmatch(text)
    if match:
        return match[1]
    for opening, closing in _LAYERS:
        is_long_enough = len(text) > len(opening) + len(closing)
        if is_long_enough and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if opening not in inner and closing not in inner:
                return inner
    return text


def without_spacing(text: str) -> str:
    """The text without spaces of any kind, for a first comparison."""
    return _SPACING.sub("", re.sub(r"\\[dt]frac", r"\\frac", text))


def with_commands(text: str) -> str:
    r"""The text with `\pi` for a bare "pi" or "π", and `\sqrt` for a root sign."""
    text = _BARE_PI.sub(r"\\pi ", text)
    return _ROOT_SIGN.sub(lambda root: rf"\sqrt{{{root[1] or root[2] or root[3] or ''}}}", text)


def is_words(text: str) -> bool:
    r"""Whether a right answer is given in words: it has one of three letters or more that is
    neither a LaTeX command, nor a function's name, nor "and"."""
    return _WORD.search(_without_commands(text)) is not None


def may_be_same_mathematics(answer: str, truth: str) -> bool:
    """Whether answers with words in them may be compared as mathematics: "1+xyz", "abc/(4R)".

    Prose may not, and words of four letters or more must be the same in both, since math-verify
    takes them for products of letters.
    """
    plain = _without_commands(truth)
    is_mathematics = _MATHEMATICS.search(_WRAPPER.sub(" ", truth)) and not _PROSE.search(plain)
    long_words = set(_LONG_WORD.findall(plain))
    return bool(is_mathematics) and set(_LONG_WORD.findall(_without_commands(answer))) == long_words


def _without_commands(text: str) -> str:
    plain = _LATEX_COMMAND.sub(" ; ", _WRAPPER.sub(" ", text))
    return _NO_WORD.sub(";", plain)


def normalised_words(text: str) -> str:
    """The text in lower case, without markup, punctuation, or an article at its beginning."""
    plain = re.sub(r"\\[,;:! ]|~", " ", _WRAPPER.sub(" ", text))
    words = _PUNCTUATION.sub(" ", plain.replace("_", "")).strip().casefold()
    return _ARTICLE.sub("", words)
