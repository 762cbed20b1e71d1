"""K-LITE's texts: against the reference's prompts, CLIP's templates and the published rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.knowledge.augment import (
    augment_caption,
    augment_prompt,
    knowledge_items,
    path_text,
    tokenize_words,
    training_path_text,
)
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.senses import hypernym_path, senses
from groundwork.data.knowledge.templates import (
    TRAINING_TEMPLATES,
    clean_class_name,
    training_prompt,
)


def golden_prompts(shared_golden: Path) -> list[dict[str, Any]]:
    return json.loads((shared_golden / "klite" / "prompts.json").read_text())["entries"]


def test_prompts_are_those_of_the_reference(shared_golden: Path) -> None:
    folder = shared_golden / "klite" / "knowledge_tsv"
    knowledge = {
        (file.name.removesuffix("_knowledge.tsv"), row["classname"]): row
        for file in folder.iterdir()
        for row in json.loads(file.read_text())
    }
    for golden in golden_prompts(shared_golden):
        row = knowledge[golden["dataset"], golden["classname"]]
        template, name = golden["template"], golden["classname"]
        text = {
            "none": template.replace("{}", name),
            "wiktionary": augment_prompt(template, name, row["def_wiki"]),
            "wordnet_definition": augment_prompt(template, name, row["def_wn"]),
            "wordnet_path": augment_prompt(template, name, path_text(row["path_wn"], compat=True)),
        }[golden["knowledge"]]
        assert text == golden["text"]


def test_the_example_of_the_reference() -> None:
    assert augment_prompt(
        "a photo of a {}.", "aeroplane", "A powered heavier-than-air aircraft with fixed wings."
    ) == (
        "a photo of a aeroplane. ; aeroplane , A powered heavier-than-air aircraft "
        "with fixed wings ."
    )


def test_words_are_split_like_the_treebank() -> None:
    assert tokenize_words("He said \"don't\"; (no. 2) it's $3.") == (
        "He said `` do n't '' ; ( no. 2 ) it 's $ 3 ."
    )
    assert tokenize_words("One sentence. And another.") == "One sentence. And another ."
    assert tokenize_words("") == ""


@given(
    template=st.sampled_from(TRAINING_TEMPLATES),
    name=st.text("abc {}%", max_size=8),
    knowledge_text=st.text(max_size=30),
)
@settings(max_examples=60, deadline=None)
def test_an_augmented_prompt_begins_with_the_plain_one(
    template: str, name: str, knowledge_text: str
) -> None:
    plain = augment_prompt(template, name, None)
    before, after = template.split("{}")
    assert plain == f"{before}{name}{after} "
    augmented = augment_prompt(template, name, knowledge_text)
    assert augmented.startswith(f"{plain};")
    assert "  " not in augmented[len(plain) :]


def test_captions_get_the_gloss_of_an_entity() -> None:
    assert augment_caption("a cat sits", "cat", 'A pet, "feline".') == (
        "a cat sits ; cat , A pet , `` feline '' ."
    )
    assert augment_caption("a cat sits", "cat", None) == "a cat sits"


def test_paths_for_evaluation_are_three_lemmas_long() -> None:
    path = ("aeroplane", "heavier-than-air_craft", "aircraft", "craft")
    assert path_text(path) == "aeroplane heavier-than-air craft aircraft"
    assert path_text(path, compat=True) == "aeroplane heavier-than-air_craft aircraft"
    assert path_text(path[:1]) == "aeroplane"
    assert path_text(()) == ""


def test_paths_for_training_draw_a_lemma_at_each_level(wordnet_index: KnowledgeIndex) -> None:
    (sense,) = senses(wordnet_index, "airplane")
    levels = [
        {lemma.replace("_", " ").lower() for lemma in entry.lemmas}
        for entry in hypernym_path(wordnet_index, sense)
    ]
    drawn: list[set[str]] = [set() for _ in levels]
    for seed in range(200):
        text = training_path_text(wordnet_index, sense, np.random.default_rng(seed))
        again = training_path_text(wordnet_index, sense, np.random.default_rng(seed))
        assert text == again
        for seen, lemma in zip(drawn, text.split(" , "), strict=True):
            seen.add(lemma)
    assert drawn == levels


def test_each_source_is_an_item_of_its_own(wordnet_index: KnowledgeIndex) -> None:
    gloss = "an aircraft that has a fixed wing and is powered by propellers or jets"
    path = "airplane heavier-than-air craft aircraft"
    assert knowledge_items(wordnet_index, "airplane") == [gloss, path]
    assert knowledge_items(wordnet_index, "airplane", ("wn_path", "wn_def")) == [path, gloss]
    assert knowledge_items(wordnet_index, "airplane", ("wn_def",)) == [gloss]
    assert knowledge_items(wordnet_index, "zzyzx") == []
    with pytest.raises(ValueError, match="wn_def, wn_path"):
        knowledge_items(wordnet_index, "airplane", ("wiki_def",))


def test_templates_are_the_bare_name_and_those_of_clip() -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    clip = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    assert list(TRAINING_TEMPLATES) == ["{}.", *clip]
    assert "a close-up photo of a {}." in TRAINING_TEMPLATES
    assert all(template.count("{}") == 1 for template in TRAINING_TEMPLATES)


def test_the_readme_runs(
    wordnet_dictionary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme = Path(__file__).resolve().parents[2] / "data" / "knowledge" / "README.md"
    example = readme.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(readme), "exec"), {})
    assert capsys.readouterr().out.startswith("a photo of a grand piano. ; grand piano , a piano")


def test_class_names_are_cleaned() -> None:
    assert clean_class_name("drake, male duck") == "drake male duck"
    assert clean_class_name("salt+pepper") == "salt pepper"


def test_training_prompts_draw_all_templates_and_names() -> None:
    rng = np.random.default_rng(0)
    drawn = [training_prompt(("tench", "Tinca, tinca"), rng) for _ in range(3000)]
    assert {template for template, _ in drawn} == set(TRAINING_TEMPLATES)
    assert {name for _, name in drawn} == {"tench", "Tinca tinca"}
    with pytest.raises(ValueError, match="without names"):
        training_prompt((), rng)
