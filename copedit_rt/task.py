"""Brain or heart: the two tasks of the product."""

from typing import Literal

Task = Literal["brain", "cardiac"]
