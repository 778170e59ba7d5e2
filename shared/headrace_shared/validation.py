"""What pydantic says is wrong with a value, in the words of this project's own sentences."""

from pydantic import ValidationError


def first_problem(error: ValidationError) -> str:
    """Return the place and the reason of the first thing that is wrong, and no value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    reason = plain_reason(first["msg"])
    return f"{place}: {reason}" if place else reason


def plain_reason(message: str) -> str:
    """Say it without pydantic's own introduction, as the end of a sentence.

    >>> plain_reason("Value error, Input should be greater than 0")
    'must be greater than 0'
    """
    plain = in_plain_words(message)
    return plain[:1].lower() + plain[1:]


def in_plain_words(sentence: str) -> str:
    """Do the same within a sentence that quotes what pydantic says."""
    return sentence.replace("Value error, ", "").replace("Input should be", "must be")
