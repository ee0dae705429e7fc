"""Texts of classes: ensembles, files of sentences and weights, in every method and objective that takes templates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from vlprompt import create_method, list_methods
from vlprompt.backbone import Backbone
from vlprompt.config.ensembles import ENSEMBLES
from vlprompt.config.hints import is_dataclass, is_texts
from vlprompt.config.texts import DataTexts
from vlprompt.config.types import field_hints
from vlprompt.errors import ConfigError
from vlprompt.methods import get_method_class
from vlprompt.objectives import get_objective_class, list_objectives
from vlprompt.prompts.zero_shot import first_layout, group_features, raw_template_features, template_features

NAMES = ["golden_retriever", "sea lake"]
SENTENCES = {"Golden retriever": ["a dog with long fur", "a {} at play", "a friendly pet"], "sea_lake": ["blue water"]}
DATA = DataTexts("{} texture.", {"clip": ("a photo of a {}.", "a photo of the {}.")}, ("dtd", "DescribableTextures"))
PROMPTS = [["a dog with long fur", "a golden retriever at play", "a friendly pet"], ["blue water"]]


def lists(prefix: tuple[str, ...], settings: Any) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the lists of texts in settings."""
    for name, hint in field_hints(type(settings)).items():
        value = getattr(settings, name)
        if is_texts(hint):
            yield (*prefix, name)
        elif is_dataclass(type(value)):
            yield from lists((*prefix, name), value)


METHODS = [(name, path) for name in list_methods() for path in lists((), get_method_class(name).Settings())]
OBJECTIVES = [(name, path) for name in list_objectives() for path in lists((), get_objective_class(name).Settings())]
#: Settings with which a frozen text tower uses the texts of all classes, and objectives that use them in one variant.
USED: dict[str, dict[str, Any]] = {"shift_consistency": {"variant": "paper"}}
#: Groups that fit two entries, of which the first is a template.
GROUPED = ("mocoop", "grouped_text")


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    *sections, name = path
    values = {name: value}
    for section in reversed(sections):
        values = {section: values}
    return values


def texts_in(settings: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        settings = settings[name] if isinstance(settings, dict) else getattr(settings, name)
    return settings


def encoded(backbone: Backbone, prompts: list[str]) -> torch.Tensor:
    return backbone.model.encode_text(backbone.text.tokenizer(prompts)).detach()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps(SENTENCES))
    return path


# -- every method, every objective ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "path"), METHODS, ids=[".".join((name, *path)) for name, path in METHODS])
def test_every_method_takes_ensembles_and_files(
    name: str, path: tuple[str, ...], tiny_backbone: Backbone, file: Path
) -> None:
    """References are replaced by what they name; the file's sentences reach the classifier or the loss."""
    given = ["ensemble:clip", f"file:{file}"]
    grouped = {"groups": [1, 2], "top_k": 1} if name in GROUPED else {}
    method = create_method(name, tiny_backbone, NAMES, data_template=DATA, **nested(path, given), **grouped)
    resolved = texts_in(method.settings, path)
    assert resolved[:2] == DATA.ensembles["clip"] and dict(resolved[2]).keys() == SENTENCES.keys()
    made = create_method(name, tiny_backbone, NAMES, **method.settings_dict())  # a saved head knows no data set
    assert made.settings == method.settings
    assert method.with_classes(NAMES[::-1]).settings == method.settings


@pytest.mark.parametrize(("name", "path"), OBJECTIVES, ids=[".".join((name, *path)) for name, path in OBJECTIVES])
def test_every_objective_takes_ensembles_and_files(
    name: str, path: tuple[str, ...], tiny_backbone: Backbone, file: Path
) -> None:
    grouped = {"groups": [2, 1]} if name in GROUPED else {}
    given = nested(path, ["ensemble:clip", f"file:{file}"]) | USED.get(name, {}) | grouped
    method = create_method("maple", tiny_backbone, NAMES, objectives={name: given}, data_template=DATA)
    resolved = texts_in(method.objective_settings[name], path)
    assert resolved[:2] == DATA.ensembles["clip"] and dict(resolved[2]).keys() == SENTENCES.keys()
    target = getattr(method.active[0], "prototypes" if name in GROUPED else "target")
    others = nested(path, ["ensemble:clip", {key: ["another text"] for key in SENTENCES}])
    other = create_method("maple", tiny_backbone, NAMES, objectives={name: given | others}, data_template=DATA)
    changed = getattr(other.active[0], "prototypes" if name in GROUPED else "target")
    assert target.shape == changed.shape and not torch.allclose(target, changed)


SCORING = [
    (name, own)
    for name in list_methods()
    if any(path == ("templates",) for _, path in METHODS if _ == name) and name not in GROUPED
    for own in [{}, *([{"encoder": "vision"}] if name == "clip_lora" else [])]
]


@pytest.mark.parametrize(("name", "own"), SCORING, ids=[f"{name}-{'-'.join(own)}" for name, own in SCORING])
@pytest.mark.filterwarnings("ignore")
def test_the_classifier_of_every_method_uses_the_sentences(
    name: str, own: dict[str, Any], tiny_backbone: Backbone, file: Path
) -> None:
    """Untrained, a method that scores with hand-written prompts has their mean, or the first where text is trained."""
    torch.manual_seed(0)
    method = create_method(name, tiny_backbone, NAMES, templates=f"file:{file}", **own)
    weights = F.normalize(method.text_features(), dim=-1)
    rows = [encoded(tiny_backbone, prompts) for prompts in PROMPTS]
    unit = torch.stack([F.normalize(F.normalize(row, dim=-1).mean(dim=0), dim=-1) for row in rows])
    raw = torch.stack([F.normalize(row.mean(dim=0), dim=-1) for row in rows])
    first = torch.stack([F.normalize(row[0], dim=-1) for row in rows])
    if name == "apt_approximated":  # its random tokens change the text; the layout is that of the first sentences
        assert method.layout.slots.equal(first_layout(tiny_backbone.text, NAMES, method.settings.templates).slots)
    else:
        assert any(torch.allclose(weights, expected, atol=1e-5) for expected in (unit, raw, first))


# -- means ----------------------------------------------------------------------------------------------------------
def test_sentences_and_templates_are_averaged_by_their_weights(tiny_backbone: Backbone) -> None:
    entries = ("a photo of a {}.", ("a drawing of a {}.", 0.5), {"golden retriever": (("a dog", 3.0), "a pet"),
               "sea lake": ("water",)})  # fmt: skip
    rows = [
        (["a photo of a golden retriever.", "a drawing of a golden retriever.", "a dog", "a pet"], [1, 0.5, 3, 1]),
        (["a photo of a sea lake.", "a drawing of a sea lake.", "water"], [1, 0.5, 1]),
    ]
    for unit in (True, False):
        means = []
        for prompts, weights in rows:
            features = encoded(tiny_backbone, prompts)
            features = F.normalize(features, dim=-1) if unit else features
            means.append((torch.tensor(weights)[:, None] * features).sum(dim=0) / sum(weights))
        expected = torch.stack(means)
        got = template_features(tiny_backbone, NAMES, entries, "unit" if unit else "raw")
        torch.testing.assert_close(got, F.normalize(expected, dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(raw_template_features(tiny_backbone, NAMES, entries), expected, rtol=1e-5, atol=1e-5)


def test_scores_may_be_averaged_over_the_texts_of_a_class(tiny_backbone: Backbone, tiny_clip: Any) -> None:
    """DCLIP scores an image by the mean cosine of a class's descriptions."""
    method = create_method("zeroshot", tiny_backbone, NAMES, templates=[SENTENCES], average="scores")
    images = torch.from_numpy(tiny_clip.draw_images("scores", 3, 64))
    unit = F.normalize(tiny_backbone.encode_image(images), dim=-1)
    rows = [unit @ F.normalize(encoded(tiny_backbone, prompts), dim=-1).t() for prompts in PROMPTS]
    expected = tiny_backbone.logit_scale * torch.stack([row.mean(dim=1) for row in rows], dim=1)
    torch.testing.assert_close(method(images), expected, rtol=1e-4, atol=1e-4)


def test_the_texts_of_a_reference_share_its_weight(tiny_backbone: Backbone, file: Path) -> None:
    """``[file, 3]`` and ``[ensemble, 1]``: three quarters of the mean are the file's, for every class."""
    entries = DATA.resolve(((f"file:{file}", 3.0), ("ensemble:clip", 1.0)), "settings.templates")
    file_mean = raw_template_features(tiny_backbone, NAMES, [SENTENCES])  # type: ignore[list-item]
    clip_mean = raw_template_features(tiny_backbone, NAMES, DATA.ensembles["clip"])
    expected = 0.75 * file_mean + 0.25 * clip_mean
    torch.testing.assert_close(raw_template_features(tiny_backbone, NAMES, entries), expected, rtol=1e-5, atol=1e-5)


def test_a_file_is_one_entry_of_a_group(tiny_backbone: Backbone, file: Path) -> None:
    entries = DATA.resolve(("ensemble:clip", f"file:{file}"), "settings.templates")
    groups = group_features(tiny_backbone, NAMES, entries, [1, 2])
    assert groups.shape == (2, 2, tiny_backbone.embed_dim)
    torch.testing.assert_close(groups[1], template_features(tiny_backbone, NAMES, entries[1:]))
    with pytest.raises(ConfigError, match="adds up to 2, but settings.templates holds 3"):
        create_method("mocoop", tiny_backbone, NAMES, data_template=DATA, groups=[1, 1], top_k=1,
                      templates=["ensemble:clip", f"file:{file}"])  # fmt: skip
    with pytest.raises(ConfigError, match="where the words of a template are needed"):
        create_method("mocoop", tiny_backbone, NAMES, groups=[1], top_k=1, templates=f"file:{file}")


# -- named ensembles ------------------------------------------------------------------------------------------------
def test_ensembles_are_the_cards_then_the_shared_ones() -> None:
    assert DATA.resolve(("ensemble:single", "ensemble:clip"), "key") == ("{} texture.", *DATA.ensembles["clip"])
    assert len(DATA.resolve(("ensemble:selected",), "key")) == 7
    assert len(DATA.resolve(("ensemble:imagenet",), "key")) == 80
    assert len(DATA.resolve(("ensemble:promptsrc",), "key")) == 60
    with pytest.raises(ConfigError, match=r"no ensemble 'clipp' of dtd; accepted: clip, coop, .*Did you mean 'clip'"):
        DATA.resolve(("ensemble:clipp",), "key")


# -- files ----------------------------------------------------------------------------------------------------------
FORMATS: dict[str, tuple[str, Any, Any]] = {
    "templates": ("file", ["a {c}.", "the {}."], ("a {}.", "the {}.")),
    "classes": ("file", {"cat": ["a pet"], "dog": "a friend"}, ({"cat": ("a pet",), "dog": ("a friend",)},)),
    "line breaks": ("file", {"cat": ["\n\nA pet\nat home."]}, ({"cat": ("A pet at home.",)},)),
    "weights": ("file", {"cat": [["a pet", 2], "a {c}"]}, ({"cat": (("a pet", 2.0), "a {}")},)),
    "templates by data set": ("file", {"cars": ["a {c}"], "vtab/dtd": ["{c} pattern"]}, ("{} pattern",)),
    "classes by data set": ("file", {"describable-textures": {}, "dtd": {"cat": ["a pet"]}}, ({"cat": ("a pet",)},)),
    "descriptors": (
        "descriptors",
        {"cat": ["a small pet", "often asleep", "used for company", "whiskers"], "dog": []},
        ({"cat": ("{}, which is a small pet", "{}, which often asleep", "{}, which is used for company",
                  "{}, which has whiskers"), "dog": ("{}, which has",)},),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_published_forms_of_files(form: str, tmp_path: Path) -> None:
    kind, content, expected = FORMATS[form]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(content))
    assert DATA.resolve((f"{kind}:{path}",), "key") == expected


BAD_FILES: dict[str, tuple[str, str]] = {
    "no json": ("{", "not usable JSON"),
    "a number": ("3", "accepted: a list of templates"),
    "no sentences": ('{"cat": []}', "class 'cat' has no list of sentences"),
    "a number in a list": ('{"cat": [1]}', "1 is no sentence"),
    "a weight of zero": ('{"cat": [["a pet", 0]]}', "the weight is 0"),
    "no classes": ("{}", "there are no classes"),
    "empty": ("[]", "the file is empty"),
    "a template without a place": ('["a photo"]', "accepted: a list of templates"),
    "a file in a file": ('["file:other.json"]', "names other files"),
    "twice": ('{"cat": ["a"], "cat": ["b"]}', "the key 'cat' is given twice"),
    "other data sets": ('{"cars": {"Audi": ["a car"]}}', "none for dtd"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_cannot_be_used(case: str, tmp_path: Path, tiny_backbone: Backbone) -> None:
    content, expected = BAD_FILES[case]
    path = tmp_path / "texts.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        create_method("zeroshot", tiny_backbone, ["cat"], templates=f"file:{path}", data_template=DATA)
    assert expected in str(caught.value) and "settings.templates" in str(caught.value)


def test_missing_files_and_classes_are_named_with_the_nearest(
    tmp_path: Path, file: Path, tiny_backbone: Backbone
) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*Did you mean 'sentences.json'\?"):
        create_method("zeroshot", tiny_backbone, NAMES, templates=f"file:{tmp_path / 'sentence.json'}")
    with pytest.raises(ConfigError) as caught:
        create_method("tip_adapter", tiny_backbone, [*NAMES, "golden retreiver"], templates=f"file:{file}")
    assert "1 of 3 classes have no sentences" in str(caught.value)
    SENTENCES_TOO = {**SENTENCES, "annual crops": ["a field"]}
    file.write_text(json.dumps(SENTENCES_TOO))
    with pytest.raises(ConfigError, match=r"'annual crop' \(nearest: 'annual crops'\)"):
        create_method("kgcoop", tiny_backbone, [*NAMES, "annual crop"], knowledge={"templates": f"file:{file}"})
    method = create_method("zeroshot", tiny_backbone, NAMES, templates=f"file:{file}")
    with pytest.raises(ConfigError, match="'cat'"):
        method.with_classes(["cat"])


def test_two_spellings_of_a_class_are_refused(tiny_backbone: Backbone) -> None:
    texts = {"red panda": ["a panda"], "red_panda": ["a bear"]}
    exact = create_method("zeroshot", tiny_backbone, ["red_panda"], templates=texts)
    other = create_method("zeroshot", tiny_backbone, ["red_panda"], templates={"Red Panda": ["a bear"]})
    torch.testing.assert_close(exact.text_features(), other.text_features())
    with pytest.raises(ConfigError, match="'red panda' and 'red_panda' both fit the class 'Red Panda'"):
        create_method("zeroshot", tiny_backbone, ["Red Panda"], templates=texts)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["a photo"], "templates[0] is 'a photo'"),
        (["ensemble:"], "templates[0] is 'ensemble:'"),
        ([["{}", 0]], "the weight is 0"),
        ([["{}", "x"]], "templates[0]"),
        ([{}], "there are no classes"),
        ({"cat": 1}, "class 'cat' has no list of sentences"),
        ("ensemble:", "templates is 'ensemble:'"),
        ([{"cat": []}], "class 'cat' has no list of sentences"),
        ([{"cat": ["{} {}"]}], "'{} {}' is no sentence"),
        ("a photo of a {}.", "templates is 'a photo of a {}.'"),
    ],
)
def test_entries_that_are_not_accepted(given: Any, why: str, tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError) as caught:
        create_method("zeroshot", tiny_backbone, NAMES, templates=given)
    assert why in str(caught.value) and "accepted: " in str(caught.value)


# -- CoOp's ensemble ------------------------------------------------------------------------------------------------
def test_the_zero_shot_ensemble_has_7_templates_on_imagenet_and_8_elsewhere(tiny_backbone: Backbone) -> None:
    """CoOp: trainers/zsclip.py 81-83 appends the data set's template, except on ImageNet."""
    from vlprompt.datasets import find_card

    for data, count in (("imagenet", 7), ("imagenetv2", 8), ("dtd", 8), ("demo", 8)):
        texts = find_card(data).texts()
        method = create_method("zeroshot", tiny_backbone, NAMES, ensemble=True, data_template=texts)
        assert len(method.settings.templates) == count and len(set(method.settings.templates)) == count
        expected = template_features(tiny_backbone, NAMES, method.settings.templates)
        torch.testing.assert_close(method.text_features(), expected)
    own = create_method("zeroshot", tiny_backbone, NAMES, ensemble=True, templates=["my {}."])
    assert len(own.settings.templates) == 8 and own.settings.templates[-1] == "my {}."
    assert dataclasses.asdict(own.settings)["ensemble"] is False


# -- the zero-shot row ----------------------------------------------------------------------------------------------
TEXT_SCORING = [*SCORING, ("vpt", {}), ("visual_prompt", {}), ("tpt", {}), ("difftpt", {}), ("tpt", {
    "context_init": "a photo of a [CLS] there"}), ("ramt", {"side": "text"}), ("clip_lora", {"encoder": "text"}),
    ("tpt", {"context_init": ""}), ("promptkd", {})]  # fmt: skip


@pytest.mark.parametrize(("name", "own"), TEXT_SCORING, ids=[f"{name}-{own}" for name, own in TEXT_SCORING])
@pytest.mark.filterwarnings("ignore")
def test_the_zero_shot_row_has_the_classifier_of_the_method(
    name: str, own: dict[str, Any], tiny_backbone: Backbone, file: Path
) -> None:
    torch.manual_seed(0)
    given = {} if "templates" not in field_hints(get_method_class(name).Settings) else {"templates": [
        "a photo of a {}.", "a drawing of the {}.", f"file:{file}"]}  # fmt: skip
    method = create_method(name, tiny_backbone, NAMES, data_template="{} texture.", **given, **own)
    zero_shot = create_method("zeroshot", tiny_backbone, NAMES, data_template="{} texture.",
                              **method.zero_shot_settings())  # fmt: skip
    weights = F.normalize(method.text_features(), dim=-1)
    if name == "apt_approximated":
        weights = F.normalize(tiny_backbone.text.encode(method.layout)[0], dim=-1)  # without its random tokens
    if own == {"context_init": ""}:
        weights = template_features(tiny_backbone, NAMES, ["{} texture."])  # random vectors have no words
    torch.testing.assert_close(zero_shot.text_features(), weights, rtol=1e-4, atol=1e-5)


def test_methods_that_learn_their_prompts_are_compared_with_the_data_sets_template(tiny_backbone: Backbone) -> None:
    own = {name for name, _ in TEXT_SCORING}
    for name in set(list_methods()) - own:
        assert create_method(name, tiny_backbone, NAMES).zero_shot_settings() == {}, name


def test_no_configuration_writes_out_a_named_ensemble() -> None:
    """Books name ensembles: a list of templates is written once."""
    named = {tuple(entries) for entries in ENSEMBLES.values()}
    books = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    found = [path.name for path in books for entries in lists_in(yaml.safe_load(path.read_text())) if entries in named]
    assert len(books) > 30 and not found


def lists_in(value: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, list):
        yield tuple(map(str, value))
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from lists_in(inner)
