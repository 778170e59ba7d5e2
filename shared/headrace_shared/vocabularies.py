"""How many tokens a text is, where a vocabulary is at hand that its reader is known to use.

The extra ``tokens`` brings the two vocabularies of OpenAI's models, in a wheel that downloads nothing.
Where it is not installed, or nobody knows what a model uses, tokens are bounded by bytes.
"""

import importlib.machinery
import importlib.util
import logging
import re
from enum import StrEnum
from functools import cache
from json.encoder import encode_basestring, encode_basestring_ascii
from types import ModuleType
from typing import Protocol

_logger = logging.getLogger(__name__)

MOST_COUNTED = 98_304
"""Bytes of text that are counted of one request: 4 ms for prose, and never more than 15, in an event loop."""

_PACKAGE = "bpe_openai"
_PRICED_AS = frozenset({"openai", "azure"})


class Vocabulary(StrEnum):
    CL100K = "cl100k_base"
    O200K = "o200k_base"


_MODELS = (
    (Vocabulary.O200K, re.compile(r"(chatgpt-4o|gpt-4o|gpt-4\.[15]|gpt-5(\.\d+)?|o1|o3|o4)(-|$)")),
    (Vocabulary.CL100K, re.compile(r"(gpt-3\.5|gpt-35|gpt-4|text-embedding-3|text-embedding-ada-002)(-|$)")),
)
"""Who uses what, as OpenAI's own tokenizer has it; the first that fits."""


def vocabulary_of(priced_as: str, model: str) -> Vocabulary | None:
    """Return what a model reads in; None where that is unknown.

    >>> vocabulary_of("openai", "gpt-4o-mini"), vocabulary_of("openai", "gpt-6-astra")
    (<Vocabulary.O200K: 'o200k_base'>, None)
    """
    if priced_as not in _PRICED_AS:
        return None
    return next((vocabulary for vocabulary, names in _MODELS if names.match(model)), None)


class Tokenizer(Protocol):
    def count(self, text: str, /) -> int:
        """Return the tokens of a text; what looks like a special token is text as well."""
        ...

    def encode(self, text: str, /) -> list[int]: ...


class Counted:
    """The texts of one request: what they take in its body, beyond their tokens."""

    __slots__ = ("_in_ascii", "_left", "_tokenizer", "saved")

    def __init__(self, tokenizer: Tokenizer, *, in_ascii: bool) -> None:
        self._tokenizer = tokenizer
        self._in_ascii = in_ascii
        self._left = MOST_COUNTED
        self.saved = 0

    def add(self, text: str) -> None:
        """Count a text that the model reads as one piece."""
        # As short as JSON can write it: the body may have more escapes, never fewer.
        size = (_ascii_length(text) if self._in_ascii else _utf8_length(text)) - len('""')
        if size > self._left:
            return
        self._left -= size
        self.saved += max(0, size - self._tokenizer.count(text))


def counted(vocabulary: Vocabulary | None, body: bytes) -> Counted | None:
    """Return a counter for the texts of a body; None where its bytes have to do."""
    tokenizer = None if vocabulary is None else tokenizer_of(vocabulary)
    return None if tokenizer is None else Counted(tokenizer, in_ascii=body.isascii())


def _ascii_length(text: str) -> int:
    # The writer escapes DEL, which JSON does not ask for, and others do not do.
    return len(encode_basestring_ascii(text)) - (len("\\u007f") - 1) * text.count("\x7f")


def _utf8_length(text: str) -> int:
    return len(encode_basestring(text).encode("utf-8", "surrogatepass"))


@cache
def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer | None:
    """Return a vocabulary; loading it takes a tenth of a second and up to 64 MB, once."""
    bindings = _bindings()
    if bindings is None:
        return None
    found: Tokenizer = bindings.tokenizer_for_encoding(vocabulary.value)
    return found


@cache
def _bindings() -> ModuleType | None:
    try:
        return _load()
    except ImportError as error:
        _logger.warning("%s cannot be used, so bytes bound tokens: %s", _PACKAGE, error)
        return None


def _load() -> ModuleType | None:
    package = importlib.util.find_spec(_PACKAGE)
    if package is None:
        return None
    # Not by importing the package, which reads all its tables into Python objects for more than a second.
    spec = importlib.machinery.PathFinder.find_spec("_bindings", package.submodule_search_locations)
    if spec is None or spec.loader is None:
        raise ImportError("it has no bindings")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
