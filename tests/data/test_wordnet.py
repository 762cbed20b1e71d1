"""WordNet: against NLTK's reader, against the released knowledge files, against ImageNet's ids."""

import importlib.util
import json
import random
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nltk
import pytest
from nltk.corpus.reader import WordNetCorpusReader

from groundwork.data.knowledge.index import Entry, KnowledgeError, KnowledgeIndex
from groundwork.data.knowledge.senses import (
    find_by_external_id,
    find_knowledge,
    hypernym_path,
    hypernym_paths,
    reference_lookup,
    senses,
)
from groundwork.data.knowledge.wordnet import build_wordnet, find_wordnet, morphy

TSV = (
    "caltech-101",
    "cifar-10",
    "country211",
    "dtd",
    "fer-2013",
    "food-101",
    "hateful-memes",
    "mnist",
    "oxford-flower-102",
    "voc-2007-classification",
)


class OfflineReader(WordNetCorpusReader):
    """NLTK's reader without the map between WordNet versions, which needs further corpora."""

    def map_wn(self, version: str = "wordnet") -> None:
        return None


@pytest.fixture(scope="module")
def nltk_wordnet(
    wordnet_dictionary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WordNetCorpusReader]:
    root = tmp_path_factory.mktemp("nltk_wordnet")
    for file in wordnet_dictionary.iterdir():
        if file.name.startswith(("data.", "index.", "cntlist")) or file.suffix == ".exc":
            shutil.copy(file, root)
    # Debian leaves this list out; NLTK wants its 45 lines, whose names nothing here compares.
    (root / "lexnames").write_text("".join(f"{n:02d}\tfile{n}\t1\n" for n in range(45)))
    # NLTK refuses corpora outside its data folders.
    nltk.data.path.append(str(root))
    with pytest.warns(UserWarning, match="multilingual"):
        reader = OfflineReader(str(root), None)
    yield reader
    nltk.data.path.remove(str(root))


@pytest.fixture(scope="session")
def released(shared_golden: Path) -> dict[str, list[dict[str, Any]]]:
    """The knowledge files released with K-LITE: data set -> classes."""
    folder = shared_golden / "klite" / "knowledge_tsv"
    return {name: json.loads((folder / f"{name}_knowledge.tsv").read_text()) for name in TSV}


def golden_entries(shared_golden: Path) -> list[dict[str, Any]]:
    return json.loads((shared_golden / "klite" / "wordnet_entries.json").read_text())["entries"]


def names(path: tuple[Entry, ...]) -> list[str]:
    return [entry.sense_id for entry in path]


def lemmas(path: tuple[Entry, ...]) -> list[str]:
    return [entry.lemmas[0] for entry in path]


def upward_lemmas(index: KnowledgeIndex, sense: Entry) -> list[list[str]]:
    """First lemmas along each way up that leaves instance hypernyms out."""
    ways = [[sense]]
    while unfinished := [way for way in ways if way[-1].hypernyms]:
        ways = [way for way in ways if not way[-1].hypernyms]
        ways += [[*way, index.entry(number)] for way in unfinished for number in way[-1].hypernyms]
    return [[entry.lemmas[0] for entry in way] for way in ways]


def as_tuple(index: KnowledgeIndex, entry: Entry) -> tuple[Any, ...]:
    """What both readers know of a sense, satellites without the number that NLTK 3.10 changed."""
    name = entry.sense_id.rsplit(".", 1)[0] if entry.pos == "s" else entry.sense_id
    parents = [index.entry(n).external_id for n in (*entry.hypernyms, *entry.instance_hypernyms)]
    return (
        name,
        entry.pos,
        int(entry.external_id[1:]),
        entry.gloss,
        list(entry.lemmas),
        sorted(int(parent[1:]) for parent in parents),
    )


def nltk_tuple(synset: Any) -> tuple[Any, ...]:
    return (
        synset.name().rsplit(".", 1)[0] if synset.pos() == "s" else synset.name(),
        synset.pos(),
        synset.offset(),
        synset.definition(),
        synset.lemma_names(),
        # NLTK keeps them in a set: their order says nothing.
        sorted(parent.offset() for parent in synset.hypernyms() + synset.instance_hypernyms()),
    )


def sampled_words(reader: WordNetCorpusReader, count: int) -> list[str]:
    """Lemmas, inflected and misspelt forms, irregular forms and words in capitals."""
    rng = random.Random(7)
    found = rng.sample(sorted(reader.all_lemma_names()), count)
    endings = ["s", "es", "ies", "ed", "ing", "er", "est", "men", "ches", "ves", "x"]
    inflected = [word[: len(word) - rng.randrange(2)] + rng.choice(endings) for word in found]
    irregular = [
        form
        for pos in "nvar"
        for form in rng.sample(
            sorted(reader._exception_map[pos]), min(count // 4, len(reader._exception_map[pos]))
        )
    ]
    return [*found, *inflected, *irregular, *(word.title() for word in found[: count // 10])]


def test_synsets_are_those_of_nltk(
    wordnet_index: KnowledgeIndex, nltk_wordnet: WordNetCorpusReader
) -> None:
    for word in sampled_words(nltk_wordnet, 1200):
        expected = [nltk_tuple(synset) for synset in nltk_wordnet.synsets(word)]
        found = [as_tuple(wordnet_index, entry) for entry in senses(wordnet_index, word)]
        assert found == expected, word


@pytest.mark.parametrize("pos", ["n", "v", "a", "s", "r"])
def test_synsets_of_one_part_of_speech_are_those_of_nltk(
    wordnet_index: KnowledgeIndex, nltk_wordnet: WordNetCorpusReader, pos: str
) -> None:
    for word in sampled_words(nltk_wordnet, 200):
        expected = [nltk_tuple(synset) for synset in nltk_wordnet.synsets(word, pos)]
        found = [as_tuple(wordnet_index, entry) for entry in senses(wordnet_index, word, pos)]
        assert found == expected, word


@pytest.mark.parametrize("pos", ["n", "v", "a", "r"])
def test_morphy_is_that_of_nltk(
    wordnet_index: KnowledgeIndex, nltk_wordnet: WordNetCorpusReader, pos: str
) -> None:
    every_irregular_form = sorted(nltk_wordnet._exception_map[pos])
    for word in [*sampled_words(nltk_wordnet, 2000), *every_irregular_form]:
        assert list(morphy(wordnet_index, word, pos)) == nltk_wordnet._morphy(word, pos), word


def test_all_hypernym_paths_are_those_of_nltk(
    wordnet_index: KnowledgeIndex, nltk_wordnet: WordNetCorpusReader
) -> None:
    for word in random.Random(8).sample(sorted(nltk_wordnet.all_lemma_names("n")), 150):
        for synset, entry in zip(
            nltk_wordnet.synsets(word, "n"), senses(wordnet_index, word, "n"), strict=True
        ):
            expected = sorted([s.name() for s in path] for path in synset.hypernym_paths())
            assert sorted(names(path) for path in hypernym_paths(wordnet_index, entry)) == expected


def test_hypernyms_stand_in_the_order_of_the_file(
    wordnet_index: KnowledgeIndex, wordnet_dictionary: Path
) -> None:
    lines = (wordnet_dictionary / "data.noun").read_text().splitlines()
    several = [line for line in lines if line.count(" @ ") > 1 and "|" in line]
    assert len(several) > 1000
    for line in several:
        entry = wordnet_index.find_external(f"n{line[:8]}")
        assert entry is not None
        parents = [wordnet_index.entry(number).external_id for number in entry.hypernyms]
        assert parents == [f"n{offset}" for offset in re.findall(r" @ (\d{8})", line)]


def test_counts_are_those_of_wordnet_3_0(wordnet_index: KnowledgeIndex) -> None:
    # WNSTATS(7WN) of version 3.0.
    assert wordnet_index.source_version == "3.0"
    assert wordnet_index.counts["entries"] == 117_659
    assert wordnet_index.counts["lemmas"] == 206_941 + 37  # 37 synsets list a lemma in two cases
    assert "Princeton University" in wordnet_index.licence


def test_every_sense_is_found_by_its_ids(wordnet_index: KnowledgeIndex) -> None:
    for number in random.Random(9).sample(range(len(wordnet_index)), 2000):
        entry = wordnet_index.entry(number)
        assert wordnet_index.find_sense(entry.sense_id) == entry
        assert wordnet_index.find_external(entry.external_id) == entry


def test_satellites_are_numbered_among_all_adjectives(wordnet_index: KnowledgeIndex) -> None:
    found = [entry.sense_id for entry in senses(wordnet_index, "big", "a")]
    assert found[:4] == ["large.a.01", "big.s.02", "bad.s.02", "big.s.04"]


def test_the_index_is_the_same_in_each_build(
    wordnet_index: KnowledgeIndex, wordnet_dictionary: Path, tmp_path: Path
) -> None:
    build_wordnet(wordnet_dictionary, tmp_path / "again.gkb")
    assert (tmp_path / "again.gkb").read_bytes() == wordnet_index.path.read_bytes()
    wordnet_index.verify()


def test_golden_first_senses_and_paths(wordnet_index: KnowledgeIndex, shared_golden: Path) -> None:
    for golden in golden_entries(shared_golden):
        if golden["query"] is None:
            assert not senses(wordnet_index, golden["classname"].replace(" ", "_"))
            continue
        found = senses(wordnet_index, golden["query"])
        first = golden["first_sense"]
        assert len(found) == golden["senses"]
        assert found[0].sense_id == first["synset"]
        assert found[0].pos == first["pos"]
        assert int(found[0].external_id[1:]) == first["offset"]
        assert list(found[0].lemmas) == first["lemmas"]
        assert found[0].gloss == first["definition"]
        path = hypernym_path(wordnet_index, found[0], "name")
        assert lemmas(path) == first["path_name_sorted"]
        # The goldens' "file order" is the order of NLTK's sets in one process (`dog` comes with
        # domestic_animal before canine, against data.noun): it fixes the parents, not their order.
        parents = [wordnet_index.entry(number).sense_id for number in found[0].hypernyms]
        assert sorted(parents) == sorted(first["hypernyms_file_order"])
        upwards = upward_lemmas(wordnet_index, found[0])
        assert first["path_file_order"] in upwards
        assert lemmas(hypernym_path(wordnet_index, found[0])) in upwards
        if len(upwards) == 1:
            assert upwards == [first["path_file_order"]]
        if found[0].pos == "n":
            every = [names(path) for path in hypernym_paths(wordnet_index, found[0])]
            assert sorted(every) == sorted(first["all_hypernym_paths"])
        nouns = senses(wordnet_index, golden["query"], "n")
        assert (nouns[0].sense_id if nouns else None) == golden["first_noun_sense"]


@pytest.mark.parametrize("dataset", TSV)
def test_the_reference_rule_gives_the_released_files(
    wordnet_index: KnowledgeIndex, released: dict[str, list[dict[str, Any]]], dataset: str
) -> None:
    for row in released[dataset]:
        knowledge = reference_lookup(wordnet_index, row["classname"])
        path, gloss = (list(knowledge.path), knowledge.gloss) if knowledge else ("", "")
        assert (path, gloss) == (row["path_wn"], row["def_wn"]), row["classname"]


@pytest.mark.parametrize("dataset", TSV)
def test_coverage_matches_or_beats_the_table(
    wordnet_index: KnowledgeIndex,
    released: dict[str, list[dict[str, Any]]],
    shared_golden: Path,
    dataset: str,
) -> None:
    table = json.loads((shared_golden / "klite" / "coverage.json").read_text())["datasets"][dataset]
    classes = [row["classname"] for row in released[dataset]]
    assert len(classes) == table["classes"]
    found = [find_knowledge(wordnet_index, name) for name in classes]
    covered = [knowledge for knowledge in found if knowledge is not None]
    released_count = sum(reference_lookup(wordnet_index, name) is not None for name in classes)
    assert released_count == table["tsv_wordnet_definition"]
    assert sum(knowledge.exact for knowledge in covered) >= table["reachable_wordnet_normalised"]
    assert len(covered) >= table["reachable_wordnet_with_head_noun"]


def test_imagenet_names_lead_to_the_senses_of_imagenet(wordnet_index: KnowledgeIndex) -> None:
    """The class ids are WordNet offsets, so they tell which sense a class name means."""
    from open_clip import IMAGENET_CLASSNAMES

    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.origin is not None
    listed = Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt"
    class_ids = listed.read_text().split()
    scores = {}
    for prefer in ("first", "physical"):
        found = [find_knowledge(wordnet_index, n, prefer=prefer) for n in IMAGENET_CLASSNAMES]
        truth = [find_by_external_id(wordnet_index, class_id) for class_id in class_ids]
        pairs = [(k, t) for k, t in zip(found, truth, strict=True) if k is not None]
        right = sum(t is not None and k.sense_id == t.sense_id for k, t in pairs)
        scores[prefer] = len(pairs), right / len(pairs)
    assert scores["first"][0] >= 991 and scores["first"][1] >= 0.733
    assert scores["physical"][0] >= 991 and scores["physical"][1] >= 0.772


@pytest.mark.parametrize(
    ("name", "matched_term", "sense_id", "exact"),
    [
        ("dog", "dog", "dog.n.01", True),
        ("Dogs", "dogs", "dog.n.01", True),
        ("grand piano", "grand piano", "grand_piano.n.01", True),
        ("grand_piano", "grand piano", "grand_piano.n.01", True),
        ("foot-ball", "foot-ball", "football.n.01", True),
        ("snoopy (cartoon beagle)", "snoopy", "snoopy.n.01", True),
        ("T-shirt", "t-shirt", "jersey.n.03", True),
        ("Côte d’Ivoire", "côte d'ivoire", "ivory_coast.n.01", True),
        ("fish & chips", "fish and chips", "fish_and_chips.n.01", True),
        ("black panda", "panda", "giant_panda.n.01", False),
        ("face with tears of joy", "face", "face.n.01", False),
        ("woman in steamy room", "woman", "woman.n.01", False),
        ("smiling face with sunglasses", "face", "face.n.01", False),
        ("person: light skin tone", "person", "person.n.01", False),
        ("off-center face", "face", "face.n.01", False),
        ("polka-dotted", "dotted", "dot.v.01", False),
        ("smiling happily with hearts", "hearts", "hearts.n.01", False),
    ],
)
def test_names_lead_to_senses(
    wordnet_index: KnowledgeIndex, name: str, matched_term: str, sense_id: str, exact: bool
) -> None:
    knowledge = find_knowledge(wordnet_index, name)
    assert knowledge is not None
    assert (knowledge.matched_term, knowledge.sense_id, knowledge.exact) == (
        matched_term,
        sense_id,
        exact,
    )


@pytest.mark.parametrize("name", ["", " ", "()", "of", "zzyzx", "Boeing 737-800", "?!", "in it"])
def test_names_without_a_head_lead_nowhere(wordnet_index: KnowledgeIndex, name: str) -> None:
    if name == "of":
        assert not senses(wordnet_index, name)
    assert (knowledge := find_knowledge(wordnet_index, name)) is None, knowledge


def test_readers_see_blanks_and_the_order_they_ask_for(wordnet_index: KnowledgeIndex) -> None:
    in_file_order = find_knowledge(wordnet_index, "cup")
    by_name = find_knowledge(wordnet_index, "cup", order="name")
    assert in_file_order is not None and by_name is not None
    assert in_file_order.path[:3] == ("cup", "crockery", "tableware")
    assert by_name.path[:3] == ("cup", "container", "instrumentality")
    airplane = find_knowledge(wordnet_index, "airplane")
    assert airplane is not None and airplane.path[1] == "heavier-than-air craft"


def test_a_class_id_needs_no_guess(wordnet_index: KnowledgeIndex) -> None:
    knowledge = find_by_external_id(wordnet_index, "n02012849")
    assert knowledge is not None
    assert knowledge.sense_id == "crane.n.05" and knowledge.exact
    assert find_by_external_id(wordnet_index, "n00000000") is None


def test_an_unknown_part_of_speech_is_refused(wordnet_index: KnowledgeIndex) -> None:
    with pytest.raises(ValueError, match="one of n, v, a, r, s"):
        senses(wordnet_index, "dog", "noun")


def synset(offset: int, pos: str, words: str, pointers: str, gloss: str) -> str:
    lemmas = " ".join(f"{word} 0" for word in words.split())
    count = len(pointers.split()) // 4
    word_count = f"{len(words.split()):02x}"
    return f"{offset:08d} 00 {pos} {word_count} {lemmas} {count:03d} {pointers} | {gloss}\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A dictionary of five synsets: two nouns, two verbs in a circle, one satellite adjective."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    files = {
        "data.noun": "  1 A notice of our own.  \n"
        + synset(100, "n", "thing", "", "what there is; \"a thing\"; 'quoted'")
        + synset(200, "n", "Round_thing ball(p)", "@ 00000100 n 0000", "a thing that rolls"),
        "index.noun": "  1 A notice of our own.  \n"
        "thing n 1 0 1 0 00000100\nround_thing n 1 1 @ 1 0 00000200\nball n 1 1 @ 1 0 00000200\n",
        "data.verb": synset(10, "v", "hold", "@ 00000020 v 0000", "keep")
        + synset(20, "v", "keep", "@ 00000010 v 0000", "hold"),
        "index.verb": "hold v 1 1 @ 1 0 00000010\nkeep v 1 1 @ 1 0 00000020\n",
        "data.adj": synset(30, "s", "round", "", "like a ball"),
        "index.adj": "round a 1 0 1 0 00000030\n",
        "data.adv": "",
        "index.adv": "",
        "noun.exc": "balz ball\nthing_s nothing_known\n",
        "verb.exc": "held hold\n",
        "adj.exc": "",
        "adv.exc": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_dictionary_is_read_as_documented(tiny: Path, tmp_path: Path) -> None:
    counts = build_wordnet(find_wordnet(tiny), tmp_path / "tiny.gkb")
    index = KnowledgeIndex(tmp_path / "tiny.gkb")
    assert counts == {"entries": 5, "terms": 6, "lemmas": 6, "aliases": 3}
    assert index.licence == "A notice of our own."
    assert senses(index, "balls") == (
        Entry(
            "wordnet",
            "round_thing.n.01",
            "n",
            ("Round_thing", "ball"),
            "a thing that rolls",
            (0,),
            (),
            "n00000200",
        ),
    )
    assert [entry.gloss for entry in senses(index, "thing")] == ["what there is; ; 'quoted'"]
    assert [entry.sense_id for entry in senses(index, "round")] == ["round.s.01"]
    assert morphy(index, "balz", "n") == ("ball",)
    assert morphy(index, "thing_s", "n") == ()
    assert senses(index, "thing_s") == ()


def test_a_circle_of_hypernyms_ends(tiny: Path, tmp_path: Path) -> None:
    build_wordnet(tiny, tmp_path / "tiny.gkb")
    index = KnowledgeIndex(tmp_path / "tiny.gkb")
    (hold,) = senses(index, "held")
    assert lemmas(hypernym_path(index, hold)) == ["hold", "keep"]
    assert [lemmas(path) for path in hypernym_paths(index, hold)] == [["keep", "hold"]]


def test_the_archives_of_others_are_found(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    princeton = tmp_path / "WordNet-3.0"
    shutil.copytree(tiny, princeton / "dict")
    assert find_wordnet(princeton) == princeton / "dict"

    archive = tmp_path / "nltk" / "corpora" / "wordnet.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in tiny.iterdir():
            zipped.write(file, f"wordnet/{file.name}")
    monkeypatch.setattr(
        "groundwork.data.knowledge.wordnet.DEBIAN_DICTIONARY", tmp_path / "not_installed"
    )
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
    assert find_wordnet() == archive
    build_wordnet(archive, tmp_path / "zip.gkb")
    build_wordnet(tiny, tmp_path / "folder.gkb")
    assert (tmp_path / "zip.gkb").read_bytes() == (tmp_path / "folder.gkb").read_bytes()


def test_a_missing_dictionary_is_reported_with_the_remedy(tiny: Path) -> None:
    (tiny / "verb.exc").unlink()
    with pytest.raises(KnowledgeError) as error:
        find_wordnet(tiny)
    assert str(tiny) in str(error.value)
    assert "apt-get install wordnet-base" in str(error.value)
    assert "--dictionary DIR" in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data.verb", "00000010 00 v 01 hold 0 001 @ 000\n", r"data\.verb, line 1"),
        ("data.adj", "no synset at all\n", r"data\.adj, line 1"),
        ("index.noun", "  head\nthing n 2 0 2 0 00000100\n", r"index\.noun, line 2"),
        ("index.noun", "thing n\n", r"index\.noun, line 1"),
        ("index.verb", "hold v 1 0 1 0 00000011\n", "do not belong together"),
        ("index.verb", "", "do not belong together"),
    ],
)
def test_a_broken_dictionary_is_reported_by_line(
    tiny: Path, tmp_path: Path, file: str, text: str, message: str
) -> None:
    (tiny / file).write_text(text)
    with pytest.raises(KnowledgeError, match=message):
        build_wordnet(tiny, tmp_path / "broken.gkb")
    assert not (tmp_path / "broken.gkb").exists()


def test_a_dictionary_that_is_no_text_is_reported(tiny: Path, tmp_path: Path) -> None:
    (tiny / "data.noun").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KnowledgeError, match="not a readable WordNet dictionary"):
        build_wordnet(tiny, tmp_path / "broken.gkb")
