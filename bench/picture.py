"""The README's picture: masks at L1 to L4 over a real image that may be redistributed.

    python -m bench.picture

The image is server/web/samples/cells.png (see NOTICE).
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bench.inputs import png_of
from bench.levels import BUNDLE
from bench.serving import serving
from bench.table import RESULTS

SAMPLE = Path("server/web/samples/cells.png")
SIDE = 320


def main() -> None:
    """Writes results/picture.png."""
    image = Image.open(SAMPLE).convert("RGB").crop((0, 0, SIDE, SIDE))
    body = png_of(np.asarray(image))
    panels = [("image", image)]
    with serving(Path(BUNDLE)) as server:
        for name, query in [*((f"L{n}", f"level={n}") for n in (1, 2, 3, 4)), ("accurate", "mode=accurate")]:
            answer = server.client.post(f"/segment?{query}&format=overlay", content=body).raise_for_status()
            panels.append((name, Image.open(io.BytesIO(answer.content))))
    sheet = Image.new("RGB", ((SIDE + 8) * len(panels) - 8, SIDE + 24), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, panel) in enumerate(panels):
        left = index * (SIDE + 8)
        draw.text((left + 4, 6), name, fill="black")
        sheet.paste(panel, (left, 24))
    sheet.save(RESULTS / "picture.png", optimize=True)


if __name__ == "__main__":
    main()
