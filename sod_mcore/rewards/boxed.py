r"""Extraction of the final answer from `\boxed{...}`, with nested braces."""

_OPENING = r"\boxed{"


def extract_last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, or None if there is none or its brace stays open.

    A backslash takes the next character out of the count, so that `\{` and `\}` are content.
    """
    opening = text.rfind(_OPENING)
    if opening < 0:
        return None
    start = opening + len(_OPENING)
    depth = 1
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[start:position]
        position += 1
    return None
