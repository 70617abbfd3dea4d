"""Loops compiled by numba: the only file of fedq that imports numba.

A file of compiled loops ends in `_loops.py` and stands beside the coder or stage that it serves. Of fedq it imports
this file and other files of loops only. Coders and stages import their loops within the function that calls them:
`import fedq.encoding` works without numba, and is faster by numba's half second.

numba compiles a loop at its first call: some 10 seconds for all loops. numba keeps the machine code in the loop's
`__pycache__`, or in `NUMBA_CACHE_DIR`, or in the user's cache folder. Without a folder that can be written, every
process compiles the loops that it calls.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedq.errors import MissingPackage

try:
    from numba import njit
except ImportError as error:
    raise MissingPackage('numba is missing, for compiled loops: pip install "fedq[coders]"') from error


_FOLDER = Path(__file__).parent
_TEXTS = [path.read_bytes() for path in sorted((*_FOLDER.glob("compiled.py"), *_FOLDER.rglob("*_loops.py")))]
_LOOPS = hashlib.blake2b(b"\0".join(_TEXTS), digest_size=8).hexdigest()


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a loop at its first call, for each combination of argument types; it runs without Python's lock.

    numba's cache follows changes of the loop's own file only (numba#1833). So the loop's name in the cache holds a hash
    of all loops: a change of any of them compiles all again.
    """
    function.__qualname__ += f"-{_LOOPS}"
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba finds no folder for its cache
        return njit(nogil=True)(function)
