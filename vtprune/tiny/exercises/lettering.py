"""Lower-case letters of 5 x 7 dots, enough to write the colours; drawn here, so that no font file is needed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_ROWS, _COLUMNS = 7, 5
# a row of letters at a time, seven lines each; '#' is ink
_ALPHABET = """
a     b     c     d     e     g     k     l
..... #.... ..... ....# ..... ..... #.... .##..
..... #.... ..... ....# ..... ..... #...# ..#..
.###. ####. .###. .#### .###. .#### #..#. ..#..
....# #...# #...# #...# #...# #...# ###.. ..#..
.#### #...# #.... #...# ##### .#### #..#. ..#..
#...# #...# #...# #...# #.... ....# #...# ..#..
.#### ####. .###. .#### .###. ####. #...# .###.
n     o     r     t     u     w     y
..... ..... ..... .#... ..... ..... .....
..... ..... ..... .#... ..... ..... #...#
####. .###. #.##. ###.. #...# #...# #...#
#...# #...# ##..# .#... #...# #.#.# #...#
#...# #...# #.... .#... #...# #.#.# .####
#...# #...# #.... .#..# #...# ##.## ....#
#...# .###. #.... ..##. .#### #...# .###.
"""


@lru_cache(maxsize=1)
def _glyphs() -> dict[str, np.ndarray]:
    lines = [line.split() for line in _ALPHABET.strip().splitlines()]
    glyphs = {}
    for first in range(0, len(lines), _ROWS + 1):
        for column, letter in enumerate(lines[first]):
            rows = [lines[first + 1 + row][column] for row in range(_ROWS)]
            glyphs[letter] = np.array([[dot == "#" for dot in row] for row in rows], np.float32)
    return glyphs


def lettering(word: str, scale: int = 2) -> np.ndarray:
    """[7 * scale, (6 * letters - 1) * scale] float32 ink of a written word.

    Raises:
        KeyError: if a letter of the word is not in the alphabet above.
    """
    columns = [part for letter in word for part in (_glyphs()[letter], np.zeros((_ROWS, 1), np.float32))]
    return np.kron(np.concatenate(columns[:-1], 1), np.ones((scale, scale), np.float32))
