"""How nbval compares a notebook's outputs here: words exactly, numbers as far as they are printed.

Processors add up in different orders. The last digits of a sum then differ between two machines on
which a notebook is equally right: an entropy of 3.8650 is printed as 3.86 on one, as 3.87 on the
other.
"""

import re
from itertools import zip_longest

from nbval import plugin

# Digits within a name (fp16, v2.7) or a version (2.13.0) are words.
NUMBER = re.compile(
    r"(?<![\w.])([+\-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.(\d+))?(?:e([+-]?\d+))?)(%?)(?![.\d]*\d)"
)
RELATIVE = 1e-4  # of numbers printed to many digits: float32, through thirty layers and back
SLOW = "SlowPrecision"  # the warning of helpers/machine.py
VARIES = "numbers-vary"  # the tag of a cell of which the words are compared, and no number


def number(text):
    """Value of a printed number, and the unit of its last digit; of a whole number, a count, 0."""
    digits, fraction, exponent, percent = NUMBER.fullmatch(text).groups()
    counts = fraction is None and exponent is None and not percent
    unit = 0 if counts else 10.0 ** (int(exponent or 0) - len(fraction or ""))
    return float(digits.replace(",", "").replace("−", "-")), unit


def near(new, stored):
    """Is one printed number the other, up to what may change with the processor?

    By one unit of the last digit, which is what a value in the middle between two printed ones
    does, and by a thousandth. Counts do not change.
    """
    (a, unit), (b, other) = number(new), number(stored)
    if not unit or not other:
        return a == b and unit == other
    return abs(a - b) <= 1.01 * min(unit, other) + RELATIVE * abs(b)


def pieces(text):
    """Words and numbers of a text in turn, without the spaces that align numbers in columns."""
    text, end = str(text), 0
    for found in NUMBER.finditer(text):
        yield text[end : found.start()].strip(" ")
        yield found[0]
        end = found.end()
    yield text[end:].strip(" ")


def differences(new, stored, numbers=True):
    """``(line of the stored text, new, stored)`` for every piece that is another one."""
    found, line = [], 1
    for place, (a, b) in enumerate(zip_longest(pieces(new), pieces(stored), fillvalue="")):
        both = place % 2 and a and b  # every second piece is a number
        if not (a == b or (both and (not numbers or near(a, b)))):
            found.append((line, a, b))
        line += b.count("\n")
    return found


class Output(str):
    """A text of a cell's output, which equals every text that says the same."""

    __hash__ = str.__hash__
    numbers = True

    def __eq__(self, other):
        return not differences(self, other, self.numbers)

    def __ne__(self, other):
        return not self == other


class Cell(plugin.IPyNbCell):
    """nbval's cell, which compares its outputs as above."""

    def setup(self):
        super().setup()
        self.output_timeout = 120  # seconds for an output to arrive: the machine may be busy

    def sanitize(self, output):
        """Every output goes through here, on its way to be compared."""
        output = super().sanitize(output)
        if isinstance(output, str):
            output = Output(output)
            output.numbers = VARIES not in self.cell.metadata.get("tags", [])
        return output

    def compare_outputs(self, test, ref, skip_compare=None):
        """What this machine is slow at is told on stderr, and another machine is not."""
        told = [o for o in test if o.get("name") == "stderr" and f": {SLOW}: " in o["text"]]
        return super().compare_outputs([o for o in test if o not in told], ref, skip_compare)

    def format_output_compare(self, key, stored, new):
        """Say what differs, as nbval's diff of both texts shows every digit that may differ too."""
        for line, *pair in differences(new, stored, stored.numbers)[:10]:
            said = "line {} of {}: {!r} is stored as {!r}".format(line, key, *pair)
            self.comparison_traceback.append(said)
        super().format_output_compare(key, stored, new)


def pytest_itemcollected(item):
    if type(item) is plugin.IPyNbCell:
        item.__class__ = Cell
