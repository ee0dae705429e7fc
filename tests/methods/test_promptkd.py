"""PromptKD: the loss as an equation, labels that do not count, text that is encoded once, heads without a teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_method, load_backbone, load_head
from vlprompt.backbone import Backbone, shapes_only
from vlprompt.errors import ClassNameError, ConfigError
from vlprompt.io.head import Head
from vlprompt.methods.teacher import Teacher
from vlprompt.prompts import Projector

ALL = ["cat", "sea lake", "aeroplane", "hot beverage", "jellyfish"]
BASE = ALL[:3]


@pytest.fixture(scope="module")
def images(tiny_clip: Any) -> Tensor:
    return torch.from_numpy(tiny_clip.draw_images("promptkd", 6, 64))


@pytest.fixture(scope="module")
def demo() -> Backbone:
    return load_backbone("demo")


@pytest.fixture
def teacher(demo: Backbone, tmp_path: Path) -> Path:
    """A trained head of another width and another prompt than the student's."""
    torch.manual_seed(5)
    method = create_method("coop", demo, ["red apple", "blue heart"], context_init="an emoji of a")
    return Head(method, {}).save_pretrained(tmp_path / "teacher")


def student(backbone: Backbone, teacher: Any = "", **settings: Any) -> Any:
    torch.manual_seed(1)
    return create_method("promptkd", backbone, BASE, all_class_names=ALL, teacher=str(teacher), **settings)


def test_the_loss_is_the_equation_and_labels_do_not_count(tiny_backbone: Backbone, images: Tensor) -> None:
    temperature = 2.0
    method = student(tiny_backbone, weight=50.0, temperature=temperature)
    zeroshot = create_method("zeroshot", tiny_backbone, ALL)
    (loss,) = method.train().losses(images, torch.zeros(6, dtype=torch.int64)).values()
    assert torch.equal(loss, student(tiny_backbone, weight=50.0, temperature=2.0).losses(images, torch.arange(6))["kd"])

    def array(value: Tensor) -> Any:
        return value.detach().double().numpy()

    def unit(rows: Any) -> Any:
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def log_softmax(rows: Any) -> Any:
        return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))

    net = method.projector
    hidden = array(method.image_features(images)) @ array(net.linear1.weight).T + array(net.linear1.bias)
    hidden = (hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + 1e-5)
    projected = np.maximum(hidden, 0) @ array(net.linear2.weight).T + array(net.linear2.bias)
    text, scale = array(zeroshot.text_features()), float(tiny_backbone.logit_scale)
    own = log_softmax(scale * unit(projected) @ text.T / temperature)
    target = log_softmax(array(zeroshot(images)) / temperature)
    expected = 50.0 * temperature**2 * (np.exp(target) * (target - own)).sum() / (6 * len(ALL))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_student_comes_to_agree_with_its_teacher(tiny_backbone: Backbone, images: Tensor) -> None:
    method = student(tiny_backbone).train()
    optimizer = torch.optim.SGD(method.parameter_groups(0.01), momentum=0.9)
    found = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = method.losses(images, torch.zeros(6, dtype=torch.int64))["kd"]
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.1 * found[0]
    taught = create_method("zeroshot", tiny_backbone, BASE)(images).argmax(dim=-1)
    assert torch.equal(method.eval()(images).argmax(dim=-1), taught)


def test_training_encodes_no_text_and_evaluation_no_teacher(
    tiny_backbone: Backbone, demo: Backbone, images: Tensor, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = student(tiny_backbone, teacher)
    asked = []
    encode = method.teacher.method.image_features
    monkeypatch.setattr(method.teacher.method, "image_features", lambda x: asked.append(len(x)) or encode(x))
    for backbone in (tiny_backbone, method.teacher.method.backbone):
        monkeypatch.setattr(backbone.text, "encode", lambda *_, **__: pytest.fail("text was encoded"))
    for _ in range(2):
        sum(method.train().losses(images, torch.arange(6)).values()).backward()
    assert asked == [6, 6]
    method.eval()(images)
    assert asked == [6, 6]
    assert all(p.grad is None for _, p in method.teacher.method.named_parameters())


def test_a_head_needs_no_teacher(
    tiny_backbone: Backbone, demo: Backbone, images: Tensor, teacher: Path, tmp_path: Path
) -> None:
    method = student(tiny_backbone, teacher, image_depth=2)
    for part in (images[:4], images[2:]):
        method.train().losses(part, torch.arange(4))  # moves the running statistics
    statistics = method.projector.running_mean.clone()
    assert float(statistics.abs().max()) > 0
    head = Head(method)
    folder = head.save_pretrained(tmp_path / "head")
    assert head.text_features().shape == (3, 192) and method.trained_state()["teacher_text"].shape == (5, 192)
    new = head.with_classes(["red apple", *ALL[3:]])  # the teacher is still there to be asked
    shutil.rmtree(teacher)
    again = load_head(folder, tiny_backbone)
    assert torch.equal(again(images), head(images))
    assert torch.equal(again.method.projector.running_mean, statistics)  # type: ignore[union-attr]
    assert torch.equal(again.with_classes(ALL[3:])(images), new(images)[:, 1:])
    with pytest.raises(ClassNameError, match="'cat': classes 0, 1"):
        again.with_classes(["cat", "cat"])
    with pytest.raises(ClassNameError, match="'red apple' is none of the 5 classes(.|\n)*cannot be loaded"):
        again.with_classes(["cat", "red apple"])


def test_a_teacher_is_a_head_or_a_backbone(tiny_backbone: Backbone, demo: Backbone, teacher: Path) -> None:
    taught = student(demo, teacher)
    assert taught.teacher.method.backbone is demo, "the same weights are not kept twice"
    expected = load_head(teacher, demo).with_classes(ALL).text_features()
    torch.testing.assert_close(taught.teacher_text, expected)
    assert student(tiny_backbone).settings.teacher_dim == 64
    other = student(tiny_backbone, "demo")
    zeroshot = create_method("zeroshot", demo, ALL)
    assert other.settings.teacher_dim == 192 and torch.equal(other.teacher_text, zeroshot.text_features())
    cache = create_method("tip_adapter", tiny_backbone, BASE)
    with pytest.raises(ConfigError, match="head of tip_adapter cannot teach"):
        Teacher(cache, tiny_backbone)
    with pytest.raises(ConfigError, match=r"224(.|\n)*same preprocessing"):
        Teacher(create_method("zeroshot", shapes_only("ViT-B-16"), BASE), tiny_backbone)
    with pytest.raises(ConfigError, match="settings.teacher is 'runs/none', which is no folder of a head or run"):
        student(tiny_backbone, "runs/none")
    with pytest.raises(ConfigError, match="features have 64 numbers, not 192"):
        other.teach(Teacher(create_method("zeroshot", tiny_backbone, ALL), tiny_backbone))


def test_a_teacher_scores_as_it_does_by_itself(tiny_backbone: Backbone, images: Tensor) -> None:
    """With what its objectives add to its features (RESTORE's adapters), and a student can teach in its turn."""
    for name in ("restore", "promptkd"):
        method = create_method(name, tiny_backbone, ALL).eval()
        method.load_trained_state({key: value + 0.02 for key, value in method.trained_state().items()})
        teacher = Teacher(method, tiny_backbone)
        found = teacher.logits(teacher.image_features(images), teacher.text_features(ALL))
        torch.testing.assert_close(found, method(images).detach())
        assert teacher.dim == 64 and not found.requires_grad


def test_the_published_numbers_of_learnables() -> None:
    backbone = shapes_only("ViT-B-16")
    for settings in ({"teacher": "ViT-L-14:openai"}, {"teacher_dim": 768}):
        method = create_method("promptkd", backbone, BASE, **settings)
        assert sum(parameter.numel() for _, parameter in method.trainable_parameters()) == 1_013_760


def test_the_projector_is_the_published_stack_of_layers() -> None:
    torch.manual_seed(0)
    own = Projector(5, 7)
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(5, 7, 1), torch.nn.BatchNorm2d(7), torch.nn.ReLU(), torch.nn.Conv2d(7, 7, 1)
    )
    with torch.no_grad():
        for mine, layer in ((own.linear1, theirs[0]), (own, theirs[1]), (own.linear2, theirs[3])):
            layer.weight.copy_(mine.weight.reshape(layer.weight.shape))  # type: ignore[operator, union-attr]
            layer.bias.copy_(mine.bias)  # type: ignore[operator]
        for _ in range(3):
            x = torch.randn(4, 5)
            found, expected = own(x, learn=True), theirs.train()(x[..., None, None])[..., 0, 0]
            torch.testing.assert_close(found, expected)
        norm: Any = theirs[1]
        torch.testing.assert_close(own.running_mean, norm.running_mean)
        torch.testing.assert_close(own.running_var, norm.running_var)
        torch.testing.assert_close(own(x), theirs.eval()(x[..., None, None])[..., 0, 0])
        # One image has no variance: it is scored by what was learned, which it does not change.
        before = own.running_var.clone()
        torch.testing.assert_close(own(x[:1], learn=True), own(x)[:1])
        assert torch.equal(own.running_var, before)
    assert F.relu(torch.tensor(-1.0)) == 0 and own(x).shape == (4, 7)
