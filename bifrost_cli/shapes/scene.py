"""What an image of the toy world shows: a background tone, and things on a 4x4 grid of cells."""

from __future__ import annotations

from dataclasses import dataclass

SIZE = 64  # px, side of an image
GRID = 4  # cells a side
CELL = SIZE // GRID  # px, side of a cell
JITTER = 1  # px, largest shift of a thing from its cell's centre

# Far apart also in direction from every tone, so that a blurred rim still tells its colour.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "green": (20, 160, 60),
    "blue": (30, 70, 230),
    "yellow": (250, 215, 0),
    "purple": (145, 30, 190),
    "orange": (255, 125, 0),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "star")
TONES: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "grey": (208, 208, 212),
    "cream": (252, 236, 196),
}


@dataclass(frozen=True)
class Thing:
    """One shape: `row`, `col` name its cell from the top left; `dx`, `dy` shift it in pixels (right, down)."""

    shape: str
    colour: str
    row: int
    col: int
    dx: int = 0
    dy: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS:
            raise ValueError(f"no such thing: {self.colour} {self.shape}")
        if not (0 <= self.row < GRID and 0 <= self.col < GRID):
            raise ValueError(f"no such cell: row {self.row}, column {self.col} (0 to {GRID - 1})")
        if abs(self.dx) > JITTER or abs(self.dy) > JITTER:
            raise ValueError(f"a thing is shifted by at most {JITTER} px: {self.dx}, {self.dy}")

    @property
    def cell(self) -> int:
        """Number of its cell in reading order, 0 to 15."""
        return self.row * GRID + self.col

    @property
    def centre(self) -> tuple[int, int]:
        """Its centre (x, y) in px from the image's top left corner."""
        return self.col * CELL + CELL // 2 + self.dx, self.row * CELL + CELL // 2 + self.dy


@dataclass(frozen=True)
class Scene:
    """A tone and up to 16 things in distinct cells; the things are kept in reading order, however they are given."""

    tone: str
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        if self.tone not in TONES:
            raise ValueError(f"no such tone: {self.tone} (there are {', '.join(TONES)})")
        ordered = tuple(sorted(self.things, key=lambda thing: thing.cell))
        if len({thing.cell for thing in ordered}) < len(ordered):
            raise ValueError("two things stand in one cell")
        object.__setattr__(self, "things", ordered)
