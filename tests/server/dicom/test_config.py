"""The operator's file: what it may say, and which rule fits which series."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.dicom.config import DicomConfig, Rule, parse_config, parse_destination, read_config
from server.errors import InvalidParameter, Misconfigured

CT = {
    "modality": "CT",
    "body_part": "CHEST",
    "description": "Chest Thin 1.0",
    "called": "UNETPP",
    "caller": "CT1",
}


@pytest.mark.parametrize(
    ("patterns", "fits"),
    [
        ({}, True),
        ({"modality": "ct"}, True),
        ({"modality": "MR"}, False),
        ({"description": "*thin*"}, True),
        ({"description": "thin"}, False),
        ({"body_part": "CH?ST", "called": "UNET*"}, True),
        ({"modality": "CT", "body_part": "HEAD"}, False),
        ({"caller": "CT2"}, False),
    ],
)
def test_rule_fits_by_all_its_patterns(patterns: dict[str, str], fits: bool) -> None:
    assert Rule(**patterns).fits(CT) is fits


def test_first_rule_that_fits_counts() -> None:
    rules = [{"modality": "MR", "model": "a"}, {"modality": "CT", "model": "b"}, {"model": "c"}]
    config = parse_config({"rules": rules}, "test")
    chosen = config.choose(CT)
    assert chosen is not None
    assert chosen.params.model == "b"
    assert config.choose(CT | {"modality": "US"}) == config.rules[2]
    assert parse_config({"rules": rules[:2]}, "test").choose(CT | {"modality": "US"}) is None


def test_without_rules_the_default_model_takes_all() -> None:
    chosen = DicomConfig().choose({})
    assert chosen is not None
    assert (chosen.params.model, chosen.params.format) == (None, "dicomseg")


@given(st.dictionaries(st.sampled_from([*CT]), st.text()))
def test_no_text_of_a_header_breaks_a_rule(facts: dict[str, str]) -> None:
    assert Rule(modality="*", description="*").fits(facts)
    assert not Rule(modality="[MR]").fits(facts | {"modality": "CT"})


NODE = {"forward": "ORTHANC@127.0.0.1:4242"}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"servers": {"a": {"address": "ftp://x"}}}, "servers.a.address"),
        ({"servers": {"a": {"address": "https://u:p@x/"}}}, "servers.a.address"),
        ({"servers": {"a": {"address": "https://x/?q"}}}, "servers.a.address"),
        ({"servers": {"a/b": {"address": "https://x"}}}, "servers"),
        ({"servers": {"a": {"address": "https://x", "user": "u"}}}, "servers.a"),
        ({"servers": {"a": {"address": "https://x", "password": "p"}}}, "servers.a.password"),
        ({"node": {}}, "node.forward"),
        ({"node": NODE | {"aet": "SEVENTEEN LETTERS"}}, "node.aet"),
        ({"node": NODE | {"aet": "A@B"}}, "node.aet"),
        ({"node": {"forward": "ORTHANC"}}, "node.forward"),
        ({"node": NODE | {"tls_cert": "c.pem"}}, "tls_key"),
        ({"node": NODE | {"forward_tls": True}}, "tls_ca"),
        ({"rules": [{"modalty": "CT"}]}, "rules.0.modalty"),
        ({"rule": []}, "rule"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], part: str) -> None:
    with pytest.raises(Misconfigured, match=part):
        parse_config(values, "test")


def test_rule_that_asks_for_nonsense_is_refused() -> None:
    with pytest.raises(InvalidParameter):
        _ = Rule(mode="slow").params


@pytest.mark.parametrize(
    "text", ["A@b", "A@b:0", "A@b:70000", "@b:1", "A:1", "A B C D E F G H I J@b:1", "A@b c:1"]
)
def test_destination_has_three_parts(text: str) -> None:
    with pytest.raises(ValueError, match="AET@HOST:PORT"):
        parse_destination(text)
    assert parse_destination("A B@[::1]:104") == ("A B", "::1", 104)


def test_files_are_found_beside_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "pacs.toml"
    path.write_text('[servers.a]\naddress = "https://x/"\nuser = "u"\npassword_file = "secret"\n')
    with pytest.raises(Misconfigured, match="password_file"):
        read_config(path)
    (tmp_path / "secret").write_text("p")
    server = read_config(path).servers["a"]
    assert (server.address, server.password_file) == ("https://x", tmp_path / "secret")


@pytest.mark.parametrize("text", ["[servers", "\xff"])
def test_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pacs.toml"
    path.write_bytes(text.encode("latin-1"))
    for found in (path, tmp_path / "none.toml"):
        with pytest.raises(Misconfigured, match=found.name):
            read_config(found)
