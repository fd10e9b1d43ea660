"""The published models whose weights can be read, by the name their configurations give."""

from tim4rec_jax.interop.formats import (
    caser,
    gru4rec,
    lrurec,
    mamba4rec,
    ssd4rec,
    tim4rec,
    transformers,
)
from tim4rec_jax.interop.formats.format import Format

FORMATS: dict[str, Format] = {
    "TiM4Rec": tim4rec.FORMAT,
    "GRU4Rec": gru4rec.FORMAT,
    "Caser": caser.FORMAT,
    "LRURec": lrurec.FORMAT,
    "Mamba4Rec": mamba4rec.FORMAT,
    "SSD4Rec_r": ssd4rec.FORMAT,
    "SASRec": transformers.SASREC,
    "BERT4Rec": transformers.BERT4REC,
    "TiSASRec": transformers.TISASREC,
}

__all__ = ["FORMATS", "Format"]
