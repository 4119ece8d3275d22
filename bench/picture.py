"""The README's picture: masks at L1 to L4 over a real image that may be redistributed.

    python -m bench.picture

The image is scikit-image's `immunohistochemistry` (colonic glands; no known copyright restrictions).
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bench.levels import BUNDLE, picture, png_of
from bench.serving import serving
from bench.table import RESULTS

SIDE = 256


def main() -> None:
    """Writes results/picture.png."""
    image = picture(512)[128 : 128 + SIDE, 128 : 128 + SIDE]
    body = png_of(np.ascontiguousarray(image))
    panels = [("image", Image.fromarray(image))]
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
