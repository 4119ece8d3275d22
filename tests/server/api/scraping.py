"""Metrics as a scrape shows them."""

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families


def scrape(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Value of every sample by name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(client: httpx.Client, name: str, **labels: Any) -> float:
    """The value of `unetpp_<name>`."""
    return scrape(client)[f"unetpp_{name}", tuple(sorted(labels.items()))]


def counted(client: httpx.Client, name: str, label: str) -> dict[str, int]:
    """The counter `unetpp_<name>_total` summed by one label, without zeros."""
    found: dict[str, int] = {}
    for (sample, labels), number in scrape(client).items():
        if sample == f"unetpp_{name}_total" and number:
            key = dict(labels)[label]
            found[key] = found.get(key, 0) + int(number)
    return found
