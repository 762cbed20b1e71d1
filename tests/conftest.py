"""Fixtures for all tests: golden files kept beside the repository, and WordNet."""

import os
from pathlib import Path

import pytest

from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.wordnet import DEBIAN_DICTIONARY, build_wordnet

_REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The folder of golden files that hold others' texts and weights, so stay out of git."""
    named = os.environ.get("GROUNDWORK_GOLDEN")
    folder = Path(named) if named else _REPOSITORY.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden files in {folder}: set GROUNDWORK_GOLDEN to their folder")
    return folder


@pytest.fixture(scope="session")
def wordnet_dictionary() -> Path:
    """WordNet 3.0 as Debian ships it."""
    if not (DEBIAN_DICTIONARY / "data.noun").is_file():
        pytest.skip(f"no WordNet in {DEBIAN_DICTIONARY}: `apt-get install wordnet-base`")
    return DEBIAN_DICTIONARY


@pytest.fixture(scope="session")
def wordnet_index(
    wordnet_dictionary: Path, tmp_path_factory: pytest.TempPathFactory
) -> KnowledgeIndex:
    """The knowledge index of the whole of WordNet, built once (about 3 s)."""
    path = tmp_path_factory.mktemp("knowledge") / "wordnet.gkb"
    build_wordnet(wordnet_dictionary, path)
    return KnowledgeIndex(path)
