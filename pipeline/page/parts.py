"""The parts of a page, and its file."""

import io
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from core.errors import UserError
from core.files import atomic_write

_TEMPLATE = Path(__file__).with_name("page.html")
_LARGEST = (1600, 3200)  # pixels of a picture


@dataclass
class Table:
    """A table; the first cell of each row names it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Listing:
    """A long text, folded away."""

    caption: str
    listing: str


@dataclass
class Picture:
    """A picture, and its text for those who do not see it."""

    caption: str
    alt: str
    png: str  # base64
    size: tuple[int, int]  # width and height in pixels

    @classmethod
    def of(cls, figure: Figure, caption: str, alt: str) -> "Picture":
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        return cls(caption, alt, *_encoded(file))

    @classmethod
    def read(cls, path: Path, caption: str, alt: str) -> "Picture":
        """A picture that a run has left."""
        return cls(caption, alt, *_encoded(io.BytesIO(path.read_bytes())))


Part = str | Table | Listing | Picture


@dataclass
class Section:
    """A part of a page with a heading."""

    title: str
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def of(cls, title: str, parts: Iterator[Part]) -> "Section":
        """Take as many parts as can be made, and say what is missing."""
        section = cls(title)
        try:
            for part in parts:
                section.parts.append(part)
        except UserError as error:
            section.parts.append(f"Missing: {error}")
        except Exception as error:  # a stranger's file holds anything; the other sections stand
            section.parts.append(f"Missing: what is on disk is damaged ({error!r}).")
        return section


@dataclass
class Page:
    """A page.

    Attributes:
        result: Its first line.
        title: Its subject.
    """

    result: str
    title: str
    sections: list[Section]

    def write(self, path: Path) -> None:
        """Write the page to a file, and say where it is.

        Raises:
            UserError: The file cannot be written.
        """
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        text = environment.from_string(_TEMPLATE.read_text()).render(page=self)
        # a name of a file may hold bytes that are no text
        with atomic_write(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        print(f"The page is {path}")


def _encoded(file: io.BytesIO) -> tuple[str, tuple[int, int]]:
    """A PNG in base64 with 256 colours, which make it a third as large, and its size."""
    with Image.open(file, formats=["PNG"]) as image:
        small = image.convert("RGB")
        small.thumbnail(_LARGEST)
        packed = io.BytesIO()
        small.quantize(256).save(packed, "PNG", optimize=True)
    return b64encode(packed.getvalue()).decode(), small.size


def drawable(text: str) -> str:
    """A text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")
