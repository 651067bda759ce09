"""Progress bars."""
from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from utils import dist

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, wanted: bool = True, **more: Any) -> tqdm:
    """A bar of `total` steps on stderr that vanishes at its end; `more` is tqdm's. Its `disable` is True where it isn't
    shown: unless `wanted`, on other ranks than 0, and where stderr is no terminal."""
    from tqdm import tqdm
    shown = wanted and dist.is_main() and sys.stderr.isatty()
    return tqdm(total=total, leave=False, dynamic_ncols=True, disable=not shown, **more)
