"""The part of a final turn that answers: what stands behind its thinking.

A box or a program in the thinking is a draft, and no answer.
"""

_OPENING, _CLOSING = "<think>", "</think>"


def without_thinking(response_text: str) -> str:
    """The turn without the thinking at its beginning.

    Either the turn opens it, then it ends with the first ``</think>``, or with the turn; or the
    chat template opened it in the prompt, then it ends with the last ``</think>``.
    """
    if response_text.lstrip().startswith(_OPENING):
        return response_text.partition(_CLOSING)[2]
    first_closing = response_text.find(_CLOSING)
    if first_closing < 0 or _OPENING in response_text[:first_closing]:
        return response_text
    return response_text.rpartition(_CLOSING)[2]
