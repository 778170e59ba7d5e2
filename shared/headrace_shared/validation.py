"""What pydantic says is wrong with a value, in the words of this project's own sentences."""


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
