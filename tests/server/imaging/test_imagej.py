"""ImageJ itself opens source and answer: the same axes, the same calibration. Skipped where ImageJ (Debian's `imagej`)
or a JDK is missing."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.server.imaging.builders import described, tiff, written
from tests.server.imaging.conftest import read
from tests.server.imaging.test_encode_calibration import FORMATS, IMAGEJ_WORDS, answer

JAR = Path("/usr/share/java/ij.jar")

pytestmark = pytest.mark.skipif(
    not JAR.exists() or shutil.which("javac") is None, reason="needs ImageJ 1 and a JDK: apt install imagej"
)

# One line per file: width, height, slices, frames, sizes of a pixel, units, time between frames, origin.
PROGRAM = """
import ij.*; import ij.io.*; import ij.measure.*;
public class Show {
    public static void main(String[] names) throws Exception {
        for (String name : names) {
            ImagePlus p = new Opener().openImage(name);
            Calibration c = p.getCalibration();
            String units = c.getUnit() + " " + c.getYUnit() + " " + c.getZUnit() + " " + c.getTimeUnit();
            StringBuilder ascii = new StringBuilder();
            for (char letter : units.toCharArray()) ascii.append((int) letter).append('.');
            System.out.println(p.getWidth() + " " + p.getHeight() + " " + p.getNSlices() + " " + p.getNFrames() + " "
                + c.pixelWidth + " " + c.pixelHeight + " " + c.pixelDepth + " " + ascii + " " + c.frameInterval + " "
                + c.xOrigin + " " + c.yOrigin + " " + c.zOrigin);
        }
    }
}
"""


def sources() -> dict[str, bytes]:
    """Files by name, of which ImageJ reads the axes and sizes."""
    rng = np.random.default_rng(0)
    lengths = {"T": 2, "Z": 3, "C": 4}
    files = {}
    for axes in ("", "T", "Z", "TZ", "TC", "ZC", "TZC"):
        values = rng.integers(0, 255, (*(lengths[axis] for axis in axes), 9, 7), dtype=np.uint8)
        words = {"imagej": True, "resolution": (4, 5), "metadata": IMAGEJ_WORDS}
        files[f"hyperstack-{axes}"] = written(values, f"{axes}YX", **words)
    for unit in (1, 2, 3):
        options = {"resolution": ((254, 7), (300, 1)), "resolutionunit": unit, "photometric": "minisblack"}
        files[f"plain-{unit}"] = tiff(values[0, :3, 0], metadata=None, **options)
    lines = r"images=3 frames=3 unit=\u00B5m spacing=-2.5 yunit=cm tunit=min finterval=2 xorigin=3"
    text = "ImageJ=1.53t\n" + lines.replace(" ", "\n") + "\n"
    files["escaped"] = described(text.encode(), 3, resolution=(4.0, 0.5), resolutionunit=1)
    files["nanometres"] = described(text.replace(r"\u00B5m", "nm").encode(), 3, resolution=(0.02, 0.02))
    return files


def test_imagej_sees_the_calibration_of_the_source_in_the_answer(tmp_path: Path) -> None:
    program = tmp_path / "Show.java"
    program.write_text(PROGRAM)
    subprocess.run(["javac", "-cp", str(JAR), str(program)], check=True, cwd=tmp_path)
    names = []
    for name, data in sources().items():
        answers = {kind: answer(kind, read(data)) for kind in FORMATS}
        for kind, file in {"source": data, **answers}.items():
            names.append(f"{name} {kind}.tif")
            (tmp_path / names[-1]).write_bytes(file)
    command = ["java", "-Djava.awt.headless=true", "-cp", f"{JAR}:{tmp_path}", "Show", *names]
    ran = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    seen = dict(zip(names, ran.stdout.splitlines(), strict=True))
    for name in names:
        assert seen[name] == seen[f"{name.split()[0]} source.tif"], name
