"""When two texts are the same problem: case, spacing and sentence punctuation aside, everything counts."""

import re
import unicodedata

_PUNCTUATION = ".,;:!?…\"'`‘’‚“”„«»‹›¿¡" + "。，、；：？！「」『』" + "؟،؛۔" + "।॥"
# Where it touches numbers and names it is no punctuation: 1.5, 6 : 3, .5, 5!, 5' 7", (n + 1)!, f'(x).
_OPERATORS = re.compile(r"""(?<=\d)\s*[.,:]\s*(?=\d)|\.(?=\d)|(?<=[\d)])[!'"’”]+|(?<=\w)['’]+(?=\()""")
_BETWEEN_TEXTS = " \u241e "  # a symbol, so that "a b" with "c" is not "a" with "b c"
_INVISIBLE: dict[int, str] = {0x200B: " ", 0xFEFF: " "}  # zero-width spaces


def same_problem(text: str) -> str:
    """Reduce a text to what makes it the problem that it is.

    Letters, digits, combining marks, operators, brackets, symbols and emoji count, each of them; canonically equivalent
    ways to write a character (é as one or as two code points) do not differ.

    Returns:
        A form that is equal for two texts exactly if they are the same problem.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text.translate(_INVISIBLE)).casefold())
    words, end = [], 0
    for match in _OPERATORS.finditer(text):
        words += [*_words(text[end : match.start()]), match[0].strip()]
        end = match.end()
    words += _words(text[end:])
    return " ".join(words) or "".join(text.split())  # of nothing but punctuation, that is what counts


def joined(*texts: str) -> str:
    """Several texts as one, whose form under `same_problem` keeps them apart."""
    return _BETWEEN_TEXTS.join(texts)


def _words(text: str) -> list[str]:
    """Words and symbols; spaces around symbols make no difference."""
    spaced = (
        " " if char in _PUNCTUATION else f" {char} " if unicodedata.category(char)[0] in "PS" and char != "_" else char
        for char in text
    )
    return "".join(spaced).split()
