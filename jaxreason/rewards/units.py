"""Units after a number: known ones by their names, and any other noun by its grammar."""

import re

_KNOWN = {
    alias: aliases.split()[0]
    for aliases in (
        "cm centimeter centimeters centimetre centimetres", "mm millimeter millimeters millimetre millimetres",
        "km kilometer kilometers kilometre kilometres", "meter meters metre metres", "inch inches in", "foot feet ft",
        "yard yards yd", "mile miles mi", "unit units", "kg kilogram kilograms", "gram grams",
        "mg milligram milligrams", "pound pounds lb lbs", "ounce ounces oz", "ton tons",
        "second seconds sec", "minute minutes min",
        "hour hours hr hrs", "day days", "week weeks", "month months", "year years", "liter liters litre litres",
        "ml milliliter milliliters", "gallon gallons", "degree degrees", "radian radians", "dollar dollars usd",
        "cent cents", "euro euros", "mph", "people person persons", "% percent", "am a.m", "pm p.m", "child children",
        "man men", "woman women", "tooth teeth", "mouse mice",
    )
    for alias in aliases.split()
}  # fmt: skip
_UNIT = re.compile(
    r"(?:(?P<power>square|sq|cubic)\s+)?(?P<word>[a-z]+(?:\.m)?|%)\s*"
    r"(?:\^\s*\{?\s*(?P<exponent>[23])\s*\}?|(?P<raised>[²³]))?(?:\s*(?:/|per)\s*(?P<per>[a-z]+))?"
)
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "²": "2", "³": "3"}
_NOUNS = re.compile(r"[A-Za-z]{2,}(?:-[A-Za-z]+)*(?: [A-Za-z]{2,}(?:-[A-Za-z]+)*){0,4}")
_MIN_LETTERS = 4  # of a noun that no \text says to be words, and one fewer of a word beside it: "5 xyz" is a product

# Words that change the number before them, or make it another statement: what they follow is no count of anything.
_NO_UNITS = frozenset(
    word
    for line in (
        "hundred thousand million billion trillion quadrillion dozen dozens score half halves third thirds fourth fourths",
        "quarter quarters fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth",
        "hundredths thousandth thousandths millionth millionths hundreds thousands millions billions trillions zero one two",
        "three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety squared",
        "cubed factorial plus minus over divided times mod modulo base remainder or and to if when where unless except but",
        "not no none non less more fewer greater than least most approximately about around almost nearly roughly maybe",
        "perhaps negative positive imaginary infinity infinite undefined unknown between through until from into with without",
        "versus is are was were equals equal mul sin cos tan cot sec csc log ln exp sqrt max min gcd lcm arcsin arccos arctan",
        "pi tau phi theta alpha beta gamma delta epsilon lambda sigma omega root wrong choose power",
    )
    for word in line.split()
)


def read(tail: str, spoken: frozenset[str]) -> str | None:
    r"""The canonical unit after a number; None where ``tail`` is something else, such as a variable, ``million`` or ``or 3``.

    Args:
      spoken: words in small letters that were in ``\text{}`` or the like; other short ones may be products of variables.
    A unit that is not known is up to five words in the singular: ``red apple`` of ``red apples``.
    """
    if not tail:
        return ""
    lowered = tail.lower()
    match = _UNIT.fullmatch(lowered)
    if match and match["word"] in _KNOWN and match["word"] not in _NO_UNITS and (match["per"] or "%") in _KNOWN:
        power = match["exponent"] or _POWERS.get(match["power"] or match["raised"], "")
        return _KNOWN[match["word"]] + power + ("/" + _KNOWN[match["per"]] if match["per"] else "")
    words = lowered.split()
    if not _NOUNS.fullmatch(tail) or any(part in _NO_UNITS for word in words for part in word.split("-")):
        return None
    unspoken = [word for word in words if word not in spoken]
    if any(len(word) < (_MIN_LETTERS if word == words[-1] else _MIN_LETTERS - 1) for word in unspoken):
        return None
    return " ".join(map(_singular, words))


def agree(one: str, other: str) -> bool:
    """Whether two units may be the same: one is missing, or is the other without words before or after it."""
    short, long = sorted((one, other), key=len)
    return not short or short == long or long.endswith(f" {short}") or (long.startswith(f"{short} ") and " per " not in long)


def _singular(word: str) -> str:
    if word in _KNOWN:
        return _KNOWN[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search("(?:s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
