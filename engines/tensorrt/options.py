"""What can be asked of a build. Free of heavy imports, so that `dlrm-deploy build --help` answers at once."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16"]
"""Number format of MLPs and interaction. Tables, the last layer and the sigmoid stay fp32."""

Tables = Literal["auto", "constant", "input"]
"""Tables as constants of the plan or as inputs beside it; auto decides by size."""

PRECISIONS: tuple[str, ...] = get_args(Precision)
TABLES: tuple[str, ...] = get_args(Tables)

DEFAULT_MAX_BATCH = 2048
