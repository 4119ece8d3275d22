"""Pictures of the server in one sheet."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

# Pixels between panels, and of the lines of text under each.
GAP, TEXT = 8, 34
# What is narrower has no room for its text.
NARROWEST = 180


def sheet(panels: Sequence[tuple[str, bytes]], side: int, columns: int) -> bytes:
    """A PNG of pictures, each with a line or two of text below it.

    Args:
        panels: text, and a picture as a file.
        side: pixels of the longer side of the largest picture; all are in one scale.
        columns: pictures in a row.
    """
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in panels]
    scale = side / max(max(picture.size) for picture in pictures)
    # Enlarged pixels stay pixels.
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    pictures = [
        picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), way) for picture in pictures
    ]
    width = max(NARROWEST, *(picture.width for picture in pictures)) + GAP
    height = max(picture.height for picture in pictures) + TEXT + GAP
    rows = -(-len(panels) // columns)
    whole = Image.new("RGB", (width * min(columns, len(panels)) + GAP, height * rows + GAP), "white")
    draw = ImageDraw.Draw(whole)
    for number, ((text, _), picture) in enumerate(zip(panels, pictures, strict=True)):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        whole.paste(picture, (left, top))
        draw.multiline_text((left, top + picture.height + 4), text, fill="black")
    out = io.BytesIO()
    whole.save(out, "PNG")
    return out.getvalue()
