"""How each engine is drawn: a colour and a marker for its family, a line for its precision, the same in every chart.

The colours are Okabe and Ito's, which colour-blind readers can tell apart, darkened or lightened for their background
in chart.css; markers and dashes say the same again in grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OURS = "ours"
_FAMILIES = (  # longest name first: torch-compile-bf16 is no torch-bf16
    ("torch-compile", "compile", "diamond"),
    ("torch", "torch", "square"),
    ("onnxruntime-stock", "stock", "triangle"),
    ("fbgemm", "fbgemm", "down"),
    ("openvino", "openvino", "pentagon"),
    ("tensorrt", "tensorrt", "cross"),
)
_DASHES = ("", "7 4", "2.5 3", "9 3 2.5 3")


@dataclass(frozen=True, slots=True)
class Look:
    """One engine's appearance. `key` is its class in charts and the end of its switch's name."""

    engine: str
    key: str
    family: str
    marker: str
    dash: str
    hollow: bool
    number: int
    """Position within the family."""

    @property
    def ours(self) -> bool:
        return self.family == OURS

    @property
    def classes(self) -> str:
        """What the style sheet knows it by."""
        return f"c-{self.family} ours v{self.number % 3}" if self.ours else f"c-{self.family}"


def is_ours(engine: str) -> bool:
    """Whether an engine is ONNX Runtime with our operators, on the bundle or a converted one."""
    return engine == "onnxruntime" or engine.startswith("onnxruntime[")


def is_peer(engine: str) -> bool:
    """Whether an engine is somebody else's, on the same processor."""
    return not is_ours(engine) and not engine.startswith("tensorrt")


def looks_of(engines: Iterable[str], first: str | None = None) -> dict[str, Look]:
    """A look for each name: `first`, which is drawn strongest, then the rest of ours, then the peers by family."""
    found = sorted(dict.fromkeys(engines), key=lambda engine: (engine != first, not is_ours(engine)))
    looks = []
    seen: dict[str, int] = {}
    for engine in found:
        family, marker = _family(engine)
        number = seen.get(family, 0)
        seen[family] = number + 1
        looks.append((engine, family, marker, number))
    families = list(dict.fromkeys(family for _, family, _, _ in looks))
    looks.sort(key=lambda look: families.index(look[1]))
    return {
        engine: Look(
            engine=engine,
            key=f"e{position}",
            family=family,
            marker=marker,
            dash=_DASHES[number % len(_DASHES)],
            hollow=number % 2 == 1,
            number=number,
        )
        for position, (engine, family, marker, number) in enumerate(looks)
    }


def _family(engine: str) -> tuple[str, str]:
    if is_ours(engine):
        return OURS, "circle"
    for start, family, marker in _FAMILIES:
        if engine.startswith(start):
            return family, marker
    return "other", "cross"


def marker_path(marker: str, x: float, y: float, radius: float) -> str:
    """The outline of a marker around (x, y), as the `d` of an SVG path."""
    if marker == "circle":
        r = radius
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    if marker == "cross":
        r = radius * 0.9
        return f"M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}m0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}"
    corners, first_degrees, size = _CORNERS[marker]
    points = (
        (x + math.sin(a) * size * radius, y - math.cos(a) * size * radius)
        for a in (math.radians(first_degrees + 360 * i / corners) for i in range(corners))
    )
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points) + "z"


_CORNERS: Mapping[str, tuple[int, float, float]] = {
    "square": (4, 45, 1.25),
    "diamond": (4, 0, 1.3),
    "triangle": (3, 0, 1.35),
    "down": (3, 60, 1.35),
    "pentagon": (5, 0, 1.15),
}
