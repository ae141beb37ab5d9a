"""Published DLRM architectures by name, to export, bench or train without writing a config.

Sources: facebookresearch/dlrm `bench/` scripts (kaggle, terabyte-10m, mlperf-v1, paper), mlcommons/training
`recommendation_v2/torchrec_dlrm` (mlperf-v2), harvard-acc/DeepRecSys `models/configs` (rm1, rm2, rm3). Ours, for
benchmarks: paper-32 (paper with 32 ids in every bag) and rm2-like (many ids, dot interaction).
Names of Criteo features are TorchRec's: int_0 .. int_12, cat_0 .. cat_25, tables t_cat_0 ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dlrm_deploy.config import FeatureConfig, Interaction, ModelConfig
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.tables import TableConfig

# Row counts of the 26 Criteo tables.
_KAGGLE = (1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10,
           5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572)  # fmt: skip
_TERABYTE_10M = (9980333, 36084, 17217, 7378, 20134, 3, 7112, 1442, 61, 9758201, 1333352, 313829, 10, 2208, 11156, 122,
                 4, 970, 14, 9994222, 7267859, 9946608, 415421, 12420, 101, 36)  # fmt: skip
_MLPERF_V1 = (39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938, 155,
              4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36)  # fmt: skip
_MLPERF_V2 = (40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155,
              4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36)  # fmt: skip
_MLPERF_V2_HOTNESS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)


def _model(
    name: str,
    *,
    dense: int,
    rows: Sequence[int],
    width: int,
    pooling_factors: Sequence[int | None],
    bottom: Sequence[int],
    top: Sequence[int],
    max_ids: int | None = None,
    interaction: Interaction = "dot",
    cross_layers: int = 0,
    cross_rank: int = 0,
) -> ModelConfig:
    names = [f"cat_{i}" for i in range(len(rows))]
    return ModelConfig(
        name=name,
        dense_features=tuple(f"int_{i}" for i in range(dense)),
        tables=tuple(TableConfig(name=f"t_{n}", rows=r, width=width) for n, r in zip(names, rows, strict=True)),
        features=tuple(
            FeatureConfig(name=n, table=f"t_{n}", pooling_factor=p, max_ids=max_ids)
            for n, p in zip(names, pooling_factors, strict=True)
        ),
        bottom_mlp=tuple(bottom),
        top_mlp=tuple(top),
        interaction=interaction,
        cross_layers=cross_layers,
        cross_rank=cross_rank,
    )


def _criteo(name: str, rows: Sequence[int], width: int, bottom: Sequence[int], top: Sequence[int]) -> ModelConfig:
    return _model(name, dense=13, rows=rows, width=width, pooling_factors=[1] * 26, bottom=bottom, top=top)


_PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "kaggle": lambda: _criteo("kaggle", _KAGGLE, 16, (512, 256, 64, 16), (512, 256, 1)),
    "terabyte-10m": lambda: _criteo("terabyte-10m", _TERABYTE_10M, 64, (512, 256, 64), (512, 512, 256, 1)),
    "mlperf-v1": lambda: _criteo("mlperf-v1", _MLPERF_V1, 128, (512, 256, 128), (1024, 1024, 512, 256, 1)),
    "mlperf-v2": lambda: _model(
        "mlperf-v2", dense=13, rows=_MLPERF_V2, width=128, pooling_factors=_MLPERF_V2_HOTNESS,
        bottom=(512, 256, 128), top=(1024, 1024, 512, 256, 1), interaction="dcn", cross_layers=3, cross_rank=512,
    ),
    "rm1": lambda: _model(
        "rm1", dense=128, rows=[4_000_000] * 8, width=32, pooling_factors=[80] * 8,
        bottom=(64, 32), top=(256, 64, 1), interaction="concat",
    ),
    "rm2": lambda: _model(
        "rm2", dense=256, rows=[500_000] * 32, width=64, pooling_factors=[120] * 32,
        bottom=(128, 64), top=(128, 64, 1), interaction="concat",
    ),
    "rm3": lambda: _model(
        "rm3", dense=2560, rows=[2_000_000] * 10, width=32, pooling_factors=[20] * 10,
        bottom=(1024, 256, 32), top=(512, 256, 1), interaction="concat",
    ),
    "paper": lambda: _model(
        "paper", dense=512, rows=[1_000_000] * 8, width=64, pooling_factors=[None] * 8, max_ids=100,
        bottom=(512, 64), top=(1024, 1024, 1024, 1),
    ),
    "paper-32": lambda: _model(
        "paper-32", dense=512, rows=[1_000_000] * 8, width=64, pooling_factors=[32] * 8,
        bottom=(512, 64), top=(1024, 1024, 1024, 1),
    ),
    "rm2-like": lambda: _model(
        "rm2-like", dense=256, rows=[500_000] * 32, width=64, pooling_factors=[80] * 32,
        bottom=(128, 64), top=(512, 128, 1),
    ),
}  # fmt: skip

PRESET_NAMES: tuple[str, ...] = tuple(_PRESETS)


def preset(name: str, scale_rows: float = 1.0) -> ModelConfig:
    """The published model of that name, with the rows of its tables multiplied by `scale_rows`.

    Raises:
        ConfigError: no preset has that name; the message lists them.
    """
    if name not in _PRESETS:
        raise ConfigError(f"no preset is named {name!r}. Presets: {', '.join(PRESET_NAMES)}.")
    return _PRESETS[name]().scaled(scale_rows)
