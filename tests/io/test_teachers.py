"""A saved head teaches PromptKD, whichever door the student is made through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlprompt
from vlprompt.io.head import Head
from vlprompt.io.teachers import dim_of, method_of

NAMES = ["cat", "dog", "bird"]
STUDENT = """
import sys
from vlprompt.backbone import load_backbone
from vlprompt.methods import create_method

assert not any(name.startswith("vlprompt.io") for name in sys.modules)
student = create_method("promptkd", load_backbone("demo"), ["cat", "dog", "bird"], teacher=sys.argv[1])
print(student.settings.teacher_dim, student.text_features().double().sum().item())
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    method = vlprompt.create_method("coop", vlprompt.load_backbone("demo"), NAMES, context_length=2)
    return Head(method).save_pretrained(tmp_path_factory.mktemp("run") / "head")


def test_methods_alone_can_load_a_head_as_teacher(head: Path) -> None:
    words = [sys.executable, "-c", STUDENT, str(head.parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(vlprompt.__file__).parents[1])
    dim, total = done.stdout.split()
    backbone = vlprompt.load_backbone("demo")
    student = vlprompt.create_method("promptkd", backbone, NAMES, teacher=str(head))
    taught = method_of(head, backbone)
    assert taught.backbone is backbone, "equal weights are shared"
    assert torch.equal(student.text_features(), taught.text_features())
    assert int(dim) == dim_of(head) == backbone.embed_dim
    assert float(total) == pytest.approx(float(taught.text_features().detach().double().sum()), abs=1e-6)
