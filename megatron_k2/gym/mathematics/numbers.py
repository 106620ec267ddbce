r"""Numbers as people write them, read exactly: ``1,234.5``, ``\frac{1}{2}``, ``2 1/3``, ``5 cm``.

A value is a fraction, never a float, with the dimension of its unit. Whatever is not surely a
number is ``None`` here and left to symbolic comparison.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

LARGEST_EXPONENT = 400

SPELLINGS = (
    (r"\\left|\\right|\\displaystyle|\\[,;:! ]|~|\\quad", " "),
    (r"\\[dt]frac", r"\\frac"),
    (r"\{,\}", ","),
    (r"[\u2212\u2013]", "-"),
    (r"\\times|×|\\cdot|·", "*"),
    (r"\\%", "%"),
    (r"\\\$", "$"),
    (r"\\(?:text(?:rm|bf|it)?|mathrm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°"),
    (r"°\s*([CF])\b", r"deg\1"),
    (r"\bdeg(?:ree)?s?\s+(?:Celsius|celsius)\b", "degC"),
    (r"\bdeg(?:ree)?s?\s+(?:Fahrenheit|fahrenheit)\b", "degF"),
    (r"[\u00a0\u2009\u202f]", " "),
)
DIGITS = r"(?:\d{1,3}(?:[, ]\d{3})+|\d+)(?:\.\d+)?|\.\d+"
SIMPLE = re.compile(
    rf"({DIGITS})(?:\s*(?:\*\s*10\s*\^\s*\{{?\s*([-+]?\d+)\s*\}}?|[eE]([-+]?\d+)))?"
)
RATIO = re.compile(rf"(?:({DIGITS})\s+)?({DIGITS})\s*/\s*({DIGITS})")
FRAC = re.compile(
    r"(\d+)?\s*\\frac\s*(?:\{\s*([-+]?[\d., ]+?)\s*\}|(\d))\s*(?:\{\s*([-+]?[\d., ]+?)\s*\}|(\d))"
)

REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
SEVERAL = re.compile(r"(\S.*?[A-Za-z]),?\s+(?:and\s+)?(\d.*)")
"""Parts of one value: 3 hours 30 minutes."""

LENGTH, MASS, TIME, CURRENT, HEAT, AMOUNT, ANGLE, DOLLAR, EURO, STERLING, CELSIUS, FAHRENHEIT = (
    range(12)
)
type Dimension = tuple[tuple[int, int], ...]


def _dimension(**powers: int) -> Dimension:
    return tuple(sorted((globals()[name.upper()], power) for name, power in powers.items()))


PREFIXES = {
    **{"": 0, "k": 3, "M": 6, "G": 9, "c": -2, "m": -3, "µ": -6, "μ": -6, "u": -6, "n": -9},
    "d": -1,
}
SI = {
    "m": _dimension(length=1),
    "s": _dimension(time=1),
    "A": _dimension(current=1),
    "K": _dimension(heat=1),
    "mol": _dimension(amount=1),
    "Hz": _dimension(time=-1),
    "N": _dimension(mass=1, length=1, time=-2),
    "J": _dimension(mass=1, length=2, time=-2),
    "W": _dimension(mass=1, length=2, time=-3),
    "Pa": _dimension(mass=1, length=-1, time=-2),
    "V": _dimension(mass=1, length=2, time=-3, current=-1),
    "C": _dimension(time=1, current=1),
}
UNITS: dict[str, tuple[Fraction, Dimension]] = {
    prefix + symbol: (Fraction(10) ** power, dimension)
    for symbol, dimension in SI.items()
    for prefix, power in PREFIXES.items()
}
UNITS |= {
    prefix + "g": (Fraction(10) ** (power - 3), _dimension(mass=1))
    for prefix, power in PREFIXES.items()
}
UNITS |= {
    prefix + symbol: (Fraction(10) ** (power - 3), _dimension(length=3))
    for prefix, power in PREFIXES.items()
    for symbol in ("L", "l")
}
UNITS |= {
    "min": (Fraction(60), SI["s"]),
    "h": (Fraction(3600), SI["s"]),
    "t": (Fraction(1000), _dimension(mass=1)),
    "°": (Fraction(1), _dimension(angle=1)),
    "in": (Fraction(254, 10000), SI["m"]),
    "ft": (Fraction(3048, 10000), SI["m"]),
    "mi": (Fraction(1609344, 1000), SI["m"]),
    "lb": (Fraction(45359237, 10**8), _dimension(mass=1)),
    "degC": (Fraction(1), _dimension(celsius=1)),
    "degF": (Fraction(1), _dimension(fahrenheit=1)),
    "Wh": (Fraction(3600), SI["J"]),
    "kWh": (Fraction(3_600_000), SI["J"]),
    "$": (Fraction(1), _dimension(dollar=1)),
    "¢": (Fraction(1, 100), _dimension(dollar=1)),
    "€": (Fraction(1), _dimension(euro=1)),
    "£": (Fraction(1), _dimension(sterling=1)),
}
WORDS = {
    **{"meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm"},
    **{"centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "second": "s", "sec": "s"},
    **{"minute": "min", "hour": "h", "hr": "h", "gram": "g", "kilogram": "kg", "liter": "L"},
    **{"litre": "L", "milliliter": "mL", "millilitre": "mL", "degree": "°", "deg": "°"},
    **{"inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "mile": "mi", "pound": "lb"},
    **{"newton": "N", "joule": "J", "watt": "W", "volt": "V", "dollar": "$", "cent": "¢"},
    **{"pascal": "Pa", "mole": "mol", "kelvin": "K", "tonne": "t", "euro": "€"},
}
CURRENCIES = ("$", "€", "£")
COUNTING = {
    **{"dozen": 12, "hundred": 100, "thousand": 1000},
    **{"million": 10**6, "billion": 10**9, "trillion": 10**12},
}
UNIT_RATIO = re.compile(r"\\frac\s*\{\s*([A-Za-z]+)\s*\}\s*\{\s*([A-Za-z]+)\s*\}")
LABEL = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]{4,})*")
"""What a number counts ("12 apples"): words that say nothing about its value."""
UNIT_PART = re.compile(r"([A-Za-zµμ°$¢€£]+)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?|([²³]))?")


@dataclass(frozen=True)
class Quantity:
    """An exact value in SI units, and its unit's dimension; ``None``: no unit was written."""

    value: Fraction
    dimension: Dimension | None = None
    number: Fraction = Fraction(0)
    """As written, before the unit."""
    num_decimals: int = 0
    """Digits after the point, as written: how far the value may be rounded."""
    is_percent: bool = False


def plain(text: str) -> str:
    """One spelling of what LaTeX and Unicode write in many."""
    for pattern, instead in SPELLINGS:
        text = re.sub(pattern, instead, text)
    return re.sub(r"\s+", " ", text).strip()


def _digits(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def quantity(text: str) -> Quantity | None:
    """The number, with its unit, that the whole of a text is; ``None`` if it is anything else."""
    text = plain(text)
    sign = 1
    while text[:1] in ("-", "+"):
        sign, text = (-sign if text[0] == "-" else sign), text[1:].strip()
    money = text[:1] if text.startswith(CURRENCIES) else ""
    text = text.removeprefix(money).strip()
    read = _frac(text) or _repeating(text) or _ratio(text) or _simple(text)
    if read is None:
        return None
    number, num_decimals, rest = read
    number, rest = sign * number, rest.strip()
    first, _, others = rest.partition(" ")
    if first.lower() in COUNTING:
        number, num_decimals, rest = number * COUNTING[first.lower()], 0, others
    if rest == "%" or rest.lower() in ("percent", "per cent"):
        return Quantity(number / 100, None, number, num_decimals, is_percent=True)
    unit = _unit(f"{money} {rest}" if money else rest)
    if unit is None:
        return _sum(text) if sign > 0 else None
    factor, dimension = unit
    return Quantity(number * factor, dimension, number, num_decimals)


def _sum(text: str) -> Quantity | None:
    """The value of parts that have units of one dimension, one after another."""
    found = SEVERAL.fullmatch(text)
    parts = [quantity(part) for part in found.groups()] if found else []
    if len(parts) != 2 or not parts[0] or not parts[1] or not parts[0].dimension:
        return None
    if parts[0].dimension != parts[1].dimension:
        return None
    value = parts[0].value + parts[1].value
    return Quantity(value, parts[0].dimension, value, 0)


def _repeating(text: str) -> tuple[Fraction, int, str] | None:
    found = REPEATING.match(text)
    if not found:
        return None
    whole, fixed, again = found.groups()
    below = 10 ** len(fixed)
    value = Fraction(int((whole or "0") + fixed), below)
    value += Fraction(int(again), below * (10 ** len(again) - 1))
    return value, 0, text[found.end() :]


def _frac(text: str) -> tuple[Fraction, int, str] | None:
    found = FRAC.match(text)
    if not found:
        return None
    whole, above, above_digit, below, below_digit = found.groups()
    try:
        value = _digits(above or above_digit) / _digits(below or below_digit)
    except (ValueError, ZeroDivisionError):
        return None
    return value + (int(whole) if whole else 0), 0, text[found.end() :]


def _ratio(text: str) -> tuple[Fraction, int, str] | None:
    found = RATIO.match(text)
    if not found:
        return None
    whole, above, below = found.groups()
    if not _digits(below):
        return None
    value = _digits(above) / _digits(below)
    return value + (_digits(whole) if whole else 0), 0, text[found.end() :]


def _simple(text: str) -> tuple[Fraction, int, str] | None:
    found = SIMPLE.match(text)
    if not found:
        return None
    digits, power, exponent = found.groups()
    shift = int(power or exponent or 0)
    if abs(shift) > LARGEST_EXPONENT:
        return None
    num_decimals = len(digits.partition(".")[2]) - shift
    return _digits(digits) * Fraction(10) ** shift, num_decimals, text[found.end() :]


def _unit(text: str) -> tuple[Fraction, Dimension | None] | None:
    """Factor and dimension of a unit; no dimension of no unit; ``None`` of what is no unit."""
    text = UNIT_RATIO.sub(r"\1/\2", text).strip()
    if not text:
        return Fraction(1), None
    factor, powers, sign = Fraction(1), dict[int, int](), 1
    place = 0
    while place < len(text):
        if text[place] in " *":
            place += 1
        elif text[place] == "/" or text.startswith("per ", place):
            sign, place = -1, place + (1 if text[place] == "/" else 4)
        elif found := UNIT_PART.match(text, place):
            symbol, written, raised = found.groups()
            power = sign * int(written or {"²": 2, "³": 3}.get(raised, 1))
            word = WORDS.get(symbol.lower()) or WORDS.get(symbol.lower().removesuffix("s"))
            known = UNITS.get(word or symbol)
            if known is None:
                is_label = LABEL.fullmatch(text) and not COUNTING.keys() & set(text.lower().split())
                return (Fraction(1), None) if is_label else None
            factor *= known[0] ** power
            for base, exponent in known[1]:
                powers[base] = powers.get(base, 0) + exponent * power
            place = found.end()
        else:
            return None
    return factor, tuple(sorted((base, power) for base, power in powers.items() if power))
