"""Draws the pictures of *How the kernels work*: `python docs/pictures/draw.py` writes SVG files.

A picture stands on a ground of its own, light or dark as the reader's system, so that it can be
read on any page. Its letters are large enough for a telephone.
"""

from pathlib import Path

WIDTH = 480
STYLE = """
  svg { --ground: #fff; --ink: #1f2328; --soft: #59636e; --line: #8c959f;
        --blue: #b6dcff; --sand: #ffdfb8; --none: #f1f3f5; }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #161b22; --ink: #e6edf3; --soft: #a0aab4; --line: #6e7781;
          --blue: #1f4f82; --sand: #7a4a14; --none: #21262d; }
  }
  text { font: 14px system-ui, sans-serif; fill: var(--ink); }
  .soft { fill: var(--soft); font-size: 13px; }
  .code { font-family: ui-monospace, monospace; font-size: 13px; }
  .middle { text-anchor: middle; }
  .end { text-anchor: end; }
  .ground { fill: var(--ground); }
  .blue { fill: var(--blue); } .sand { fill: var(--sand); } .none { fill: var(--none); }
  .box { stroke: var(--line); }
  .open { fill: none; stroke: var(--line); stroke-dasharray: 4 3; }
  .arrow { fill: none; stroke: var(--ink); stroke-width: 1.5; marker-end: url(#head); }
  #head path { fill: var(--ink); }
"""


class Picture:
    """A picture that grows: shapes and words at places in pixels, from the upper left corner."""

    def __init__(self, height: int, title: str):
        self.height, self.title, self.parts = height, title, []

    def box(self, x: float, y: float, w: float, h: float, kind: str = "none box") -> None:
        """A rectangle."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="3"/>')

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """A line of words, whose lower left corner is the place."""
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}">{words}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """An arrow along some points."""
        path = " L".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path class="arrow" d="M{path}"/>')

    def labelled(self, x, y, w, h, *lines: str, kind: str = "none box", words: str = "") -> None:
        """A box with lines of words in its middle."""
        self.box(x, y, w, h, kind)
        first = y + h / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + w / 2, first + 18 * number, line, f"middle {words}")

    def svg(self) -> str:
        """The picture as a file."""
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
                f'width="{WIDTH}" role="img">',
                f"<title>{self.title}</title>",
                f"<style>{STYLE}</style>",
                f"<defs>{head}</defs>",
                f'<rect class="ground" width="{WIDTH}" height="{self.height}" rx="8"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def matrix() -> Picture:
    """The operator as a lower triangular matrix."""
    picture = Picture(232, "The matrix M of four positions")
    width, height, left, top = 106, 36, 40, 50
    picture.text(left + 2 * width, 20, "input k", "middle soft")
    picture.text(8, 42, "output q", "soft")
    for k in range(4):
        picture.text(left + (k + 0.5) * width, 42, str(k), "middle soft")
        picture.text(left - 14, top + (k + 0.6) * height, str(k), "end soft")
    for q in range(4):
        for k in range(4):
            decays = "".join(f"a{t}" for t in range(k + 1, q + 1))
            word = f"C{q}·B{k} {decays}".strip() if k <= q else "0"
            kind = ("blue" if k == q else "sand" if k < q else "none") + " box"
            place = (left + k * width, top + q * height)
            picture.labelled(*place, width, height, word, kind=kind, words="code")
    picture.text(left, 218, "a1 = exp(dt[1] A) is what position 1 leaves of the state.", "soft")
    return picture


def chunks() -> Picture:
    """The matrix in chunks."""
    picture = Picture(330, "The matrix M in three chunks")
    size, left, top, steps = 84, 16, 34, 6
    for row in range(3):
        picture.text(left + (row + 0.5) * size, 22, f"chunk {row}", "middle soft")
        for column in range(3):
            x, y = left + column * size, top + row * size
            picture.box(x, y, size, size, ("sand" if column < row else "none") + " box")
            for step in range(steps if row == column else 0):
                cell = size / steps
                picture.box(x, y + step * cell, (step + 1) * cell, cell, "blue")
    legend = [
        ("blue", "within a chunk:", "products [Q,Q]"),
        ("sand", "from earlier chunks:", "through one state,", "rank N"),
        ("none", "nothing sees what", "comes after it"),
    ]
    y = 56
    for kind, *lines in legend:
        picture.box(290, y - 13, 16, 16, f"{kind} box")
        for number, line in enumerate(lines):
            picture.text(316, y + 18 * number, line)
        y += 18 * len(lines) + 24
    picture.text(left, 312, "rows: outputs q, columns: inputs k", "soft")
    return picture


def steps() -> Picture:
    """What happens in a chunk, and what passes to the next."""
    picture = Picture(344, "The four steps of a chunk")
    for number, x in enumerate((16, 176, 336)):
        picture.text(x + 64, 22, f"chunk {number}", "middle soft")
        picture.labelled(x, 34, 128, 34, "x, dt, B, C")
        picture.arrow((x + 64, 68), (x + 64, 88))
        picture.labelled(x, 92, 128, 48, "1 within: (C Bᵀ)", "× decay, [Q,Q]", kind="blue box")
        picture.labelled(x, 150, 128, 34, "3 seen: C hᵀ", kind="sand box")
        picture.arrow((x + 116, 68), (x + 116, 78), (x + 136, 78), (x + 136, 220), (x + 132, 220))
        picture.labelled(
            x, 206, 128, 62, "2 added: S", "4 passed on:", "decay × h + S", kind="sand box"
        )
        if number < 2:
            picture.arrow((x + 128, 250), (x + 156, 250))
            picture.arrow((x + 146, 250), (x + 146, 167), (x + 156, 167))
    picture.text(
        WIDTH / 2, 298, "The output of a chunk is 1 + 3. Only step 4 waits for", "middle soft"
    )
    picture.text(
        WIDTH / 2, 316, "the chunk before. The first chunk begins with zeros", "middle soft"
    )
    picture.text(WIDTH / 2, 334, "or with initial_state.", "middle soft")
    return picture


def triton() -> Picture:
    """Programs of the Triton kernels."""
    picture = Picture(396, "What a Triton program reads, keeps and writes")
    picture.text(70, 22, "global memory", "middle soft")
    picture.text(318, 22, "one program: a row, some heads", "middle soft")
    picture.text(16, 46, "forward", "")
    picture.labelled(16, 58, 108, 34, "x, dt, B, C")
    picture.labelled(16, 106, 108, 34, "y")
    picture.box(180, 34, 284, 118, "open")
    picture.labelled(190, 44, 264, 26, "scores = C Bᵀ, for all heads", kind="blue box")
    picture.labelled(190, 80, 264, 26, "mixing = scores × decay", kind="blue box")
    picture.labelled(190, 116, 264, 26, "state [N,P] stays in registers", kind="sand box")
    picture.arrow((124, 75), (186, 75))
    picture.arrow((180, 123), (130, 123))
    picture.text(152, 68, "chunk", "middle soft")
    picture.text(16, 190, "backward, two passes", "")
    picture.labelled(16, 202, 108, 46, "x, dt, B, C", "dy")
    picture.labelled(16, 262, 108, 46, "states of", "chunks")
    picture.labelled(16, 322, 108, 46, "dx, ddt, dB,", "dC, shares")
    picture.box(180, 202, 284, 166, "open")
    picture.labelled(
        190, 212, 264, 46, "first pass, chunks 0, 1, …:", "states again", kind="sand box"
    )
    picture.labelled(
        190, 268, 264, 46, "second pass, …, 1, 0: the", "gradient of the state", kind="sand box"
    )
    picture.labelled(190, 324, 264, 34, "scores and decays again", kind="blue box")
    picture.arrow((124, 225), (186, 225))
    picture.arrow((190, 246), (150, 246), (150, 275), (128, 275))
    picture.arrow((124, 295), (186, 295))
    picture.arrow((180, 345), (128, 345))
    picture.text(16, 388, "Everything of size [Q,Q] lives and dies in the program.", "soft")
    return picture


def tpu() -> Picture:
    """Blocks of the TPU kernels, and heads in lanes."""
    picture = Picture(300, "Blocks in VMEM, and four heads in the lanes of a register")
    picture.text(70, 22, "HBM", "middle soft")
    picture.text(318, 22, "VMEM: up to 8 rows, one chunk of each", "middle soft")
    picture.labelled(16, 36, 108, 34, "x, B, C")
    picture.labelled(16, 80, 108, 34, "dt, log decay")
    picture.labelled(16, 124, 108, 34, "y")
    picture.box(180, 32, 284, 130, "open")
    picture.labelled(
        190, 42, 264, 46, "this chunk; the next one", "is being copied", kind="blue box"
    )
    picture.labelled(
        190,
        100,
        264,
        46,
        "scratch: the state of each row,",
        "kept from chunk to chunk",
        kind="sand box",
    )
    picture.arrow((124, 53), (186, 53))
    picture.arrow((124, 97), (154, 97), (154, 70), (186, 70))
    picture.arrow((180, 141), (130, 141))
    picture.text(16, 196, "128 lanes of a register: four heads of 32", "")
    for head in range(4):
        x = 16 + head * 112
        picture.labelled(x, 208, 112, 28, f"head {head}", kind="none box")
        kind, word = ("blue box", "x") if head == 1 else ("none box", "0")
        picture.labelled(x, 242, 112, 28, word, kind=kind)
    picture.text(16, 288, "For a product of head 1, the lanes of the others are zero.", "soft")
    return picture


PICTURES = {"matrix": matrix, "chunks": chunks, "steps": steps, "triton": triton, "tpu": tpu}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"kernels-{name}.svg").write_text(draw().svg())
