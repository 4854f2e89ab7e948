"""The soft penalty for responses that come close to the length limit."""


def overlong_penalty(
    response_length: int, max_response_length: int, buffer_length: int, *, factor: float = 1.0
) -> float:
    """A penalty that grows linearly over the last `buffer_length` tokens (DAPO, arXiv 2503.14476,
    equation 13; past the limit it stays at its largest).

    Args:
        response_length: tokens of the response, observations included.
        max_response_length: the limit, tokens.
        buffer_length: tokens before the limit over which the penalty grows.
        factor: the penalty at the limit.

    Returns:
        0 up to `max_response_length - buffer_length`, `-factor` from `max_response_length` on.

    Raises:
        ValueError: the buffer is empty or longer than the limit.
    """
    if not 0 < buffer_length <= max_response_length:
        raise ValueError(
            f"buffer_length = {buffer_length}: give 1 to max_response_length = "
            f"{max_response_length} tokens"
        )
    excess = response_length - (max_response_length - buffer_length)
    return -factor * min(max(excess / buffer_length, 0.0), 1.0)
