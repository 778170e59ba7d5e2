"""Money is an integer of nano-USD: a billionth of a dollar, never a float."""

from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import NewType

from headrace_shared.errors import InvalidAmount

NanoUSD = NewType("NanoUSD", int)

NANO_PER_USD = 1_000_000_000
ZERO = NanoUSD(0)

MAX_AMOUNT = NanoUSD(9_000_000 * NANO_PER_USD)
"""The largest amount a budget can count: Redis scripts count exactly up to 2**53."""


def parse_usd(text: str) -> NanoUSD:
    """Read a dollar amount such as ``5.00``.

    Raises:
        InvalidAmount: not a number, negative, finer than a nano-dollar, or above 9,000,000.

    """
    try:
        dollars = Decimal(text)
    except InvalidOperation:
        raise InvalidAmount(amount=text) from None
    nano = dollars * NANO_PER_USD if dollars.is_finite() else Decimal(-1)
    if nano < 0 or nano > MAX_AMOUNT or nano != nano.to_integral_value():
        raise InvalidAmount(amount=text)
    return NanoUSD(int(nano))


def from_decimal(dollars: Decimal) -> NanoUSD:
    """Round a dollar amount up to the next nano-dollar."""
    return NanoUSD(int((dollars * NANO_PER_USD).to_integral_value(rounding=ROUND_CEILING)))


def to_usd(amount: NanoUSD) -> Decimal:
    return Decimal(amount) / NANO_PER_USD


def format_usd(amount: NanoUSD) -> str:
    """Format an amount for a reader: cents when they say it all, else up to nine places.

    >>> format_usd(NanoUSD(5_000_000_000)), format_usd(NanoUSD(1_234_500))
    ('$5.00', '$0.0012345')
    """
    dollars, nano = divmod(abs(amount), NANO_PER_USD)
    places = f"{nano:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount < 0 else ''}${dollars:,}.{places}"
