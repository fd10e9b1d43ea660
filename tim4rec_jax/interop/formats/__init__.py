"""The published models whose weights can be read, by the name their configurations give."""

from tim4rec_jax.interop.formats import tim4rec
from tim4rec_jax.interop.formats.format import Format

FORMATS: dict[str, Format] = {
    "TiM4Rec": tim4rec.FORMAT,
}

__all__ = ["FORMATS", "Format"]
