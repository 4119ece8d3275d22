"""Renders the chart for each set of values in its folder `ci`; `python -m tests.deploy.render` renews the golden files.

The golden files are what tests read, so that they need no helm; where there is one, a test renders the chart again.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

CHART = ROOT / "deploy" / "helm" / "unetpp"
GOLDEN = Path(__file__).with_name("golden")

# Files of values, the last one wins, by the name of the golden file.
VALUE_SETS = {
    "cpu": ("ci/cpu.yaml",),
    "gpu": ("values-gpu.yaml", "ci/gpu.yaml"),
    "stores": ("ci/stores.yaml",),
    "s3": ("ci/s3.yaml",),
}

Manifests = list[dict[str, Any]]


def options(name: str) -> list[str]:
    """Returns the options of helm for a set of values."""
    return [f"--values={CHART / file}" for file in VALUE_SETS[name]]


def render(helm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `helm template` on the chart."""
    command = [helm, "template", "unetpp", str(CHART), "--namespace=imaging", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read(text: str) -> Manifests:
    """Returns the manifests of a rendered chart, by kind and name."""
    documents = [document for document in yaml.safe_load_all(text) if document]
    return sorted(documents, key=lambda one: (one["kind"], one["metadata"]["name"]))


def golden(name: str) -> Manifests:
    """Returns the committed manifests of a set of values."""
    return read((GOLDEN / f"{name}.yaml").read_text())


def main() -> None:
    """Writes the golden files."""
    helm = shutil.which("helm")
    if helm is None:
        raise SystemExit("needs helm")
    for name in VALUE_SETS:
        done = render(helm, *options(name))
        if done.returncode:
            raise SystemExit(done.stderr)
        (GOLDEN / f"{name}.yaml").write_text(done.stdout)


if __name__ == "__main__":
    main()
