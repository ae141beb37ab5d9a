"""What can be asked of a build. Free of heavy imports, so that `dlrm-deploy build --help` answers at once."""

from __future__ import annotations

from typing import Literal, get_args

Tables = Literal["auto", "constant", "input"]
"""Tables as constants of the plan or as inputs beside it; auto decides by size."""

TABLES: tuple[str, ...] = get_args(Tables)

DEFAULT_MAX_BATCH = 2048
