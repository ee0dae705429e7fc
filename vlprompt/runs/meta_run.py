"""One meta-training: from pairs to topics, domains and tasks, and from those to a learned start and a regulator."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vlprompt._dist import is_main_process
from vlprompt._files import sha256_json, write_json, write_text
from vlprompt.backbone import Backbone
from vlprompt.config.meta import MetaRunConfig
from vlprompt.datasets.records import Sample
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.fit import METRICS, check_devices, fit, make_trainer
from vlprompt.engine.memory import peak_memory
from vlprompt.engine.meta_data import MetaData
from vlprompt.engine.meta_module import MetaModule
from vlprompt.errors import ConfigError
from vlprompt.io.head import Head, backbone_facts
from vlprompt.io.regulators import REGULATOR_FILE, save_regulator
from vlprompt.meta import Regulator, RegulatorSettings
from vlprompt.meta.clustering import Clusters, cluster, without_caption
from vlprompt.meta.inspection import inspection_page
from vlprompt.meta.tasks import TaskSampler, fit_captions
from vlprompt.methods import PromptMethod, create_method
from vlprompt.pairs.features import caption_features, image_features
from vlprompt.pairs.load import Pair, load_pairs
from vlprompt.prompts import template_layout
from vlprompt.runs.folder import HEAD, RESULTS, opened, read_json, versions
from vlprompt.runs.session import configured_backbone

SCHEMA = 1
CLUSTERS, INSPECTION = "clusters.safetensors", "inspect.html"
RECONSTRUCTION = "GRAM-R, a reconstruction: the method section of arXiv 2303.06571 is not available (seed_methods 3)"


@dataclass(frozen=True)
class Tasks:
    """What tasks are made of.

    Attributes:
        pairs: The N pairs.
        captions: Their captions as they stand in prompts.
        features: Raw frozen image features ``[N, D]``.
        clusters: Topics and domains.
        sampler: The tasks.
    """

    pairs: Sequence[Pair]
    captions: Sequence[str]
    features: Tensor
    clusters: Clusters
    sampler: TaskSampler

    def words(self) -> str:
        """Return what tasks are drawn from, in words."""
        usable = self.sampler.usable
        return f"{len(usable)} topics with {sum(map(len, usable.values()))} visual domains"

    def topic_names(self) -> list[str]:
        """Return for every topic a caption out of it: what stands for it where a method needs class names."""
        first: dict[int, str] = {}
        for topic, caption in zip(self.clusters.topic.tolist(), self.captions, strict=True):
            first.setdefault(topic, caption)
        return list(dict.fromkeys(first.values()))


def meta_folder(config: MetaRunConfig) -> Path:
    """Return ``output/gram/<name>``."""
    name = config.name or f"{config.method}-{Path(config.pairs.source).stem}"
    return Path(config.output) / "gram" / name


def meta_train(config: MetaRunConfig, *, force: bool = False) -> tuple[Path, dict[str, Any]]:
    """Meta-train what ``config`` says; go on with an unfinished run, reuse a finished one.

    Args:
        config: The configuration.
        force: Start anew even if the run is there.

    Returns:
        The run's folder, for ``--init gram:FOLDER`` (start and regulator) or ``--start FOLDER``, and its results.

    Raises:
        VlpromptError: Pairs, weights, settings or values that cannot be used.
    """
    pairs, backbone = _loaded(config)
    tasks, folder = make_tasks(config, pairs, backbone), meta_folder(config)
    method = host(config, backbone, tasks.topic_names())
    pl.seed_everything(config.seed, verbose=False)
    regulator = make_regulator(config, method)
    with opened(folder, config, _inputs(config, tasks, backbone), force=force):
        known = None if force else read_json(folder / RESULTS)
        if known is not None:
            return folder, known
        clusters = tasks.clusters
        if is_main_process():
            clusters.save(folder / CLUSTERS)
        started = time.monotonic()
        own = config.meta
        with peak_memory(backbone.device) as peak:
            module = MetaModule(method, regulator, own)
            accumulate = own.tasks_per_step // config.trainer.devices
            trainer = make_trainer(
                dataclasses.replace(config.trainer, accumulate=accumulate), folder, own.steps // own.save_every
            )
            fit(trainer, module, _data(config, method, tasks), folder)
        results = {
            "schema": SCHEMA,
            "what": RECONSTRUCTION,
            "config": dataclasses.asdict(config),
            "backbone": backbone_facts(backbone),
            "pairs": len(tasks.pairs),
            "tasks": tasks.words(),
            "versions": versions(),
            "last": read_metrics(folder / METRICS)[-1],
            "train": {"seconds": round(time.monotonic() - started, 1), "peak_mb": peak.megabytes},
        }
        if is_main_process():
            facts = {"run": folder.name, "data": {"pairs": config.pairs.source}, "what": RECONSTRUCTION}
            Head(method, facts).save_pretrained(folder / HEAD)
            if regulator is not None:
                save_regulator(regulator, folder)
            write_json(folder / RESULTS, results)  # last: it marks the run as finished
        return folder, results


def inspect(config: MetaRunConfig) -> Path:
    """Write a page that shows topics, domains and tasks with thumbnails, and return it; nothing is trained.

    Raises:
        VlpromptError: As :func:`meta_train`. Where no topic has the pairs that tasks need, the page is written first.
    """
    pairs, backbone = _loaded(config)
    clustered = _clustered(config, pairs, backbone)
    problem: ConfigError | None = None
    sampler = None
    try:
        sampler = _sampler(config, clustered)
    except ConfigError as error:
        problem = error
    picture = [pair.source.open for pair in pairs]
    page = inspection_page(clustered.clusters, sampler, clustered.captions, lambda row: picture[row]())
    path = meta_folder(config) / INSPECTION
    write_text(path, page)
    if problem is not None:
        raise ConfigError(f"{problem}\nWhat there is can be seen in {path}") from problem
    return path


def _loaded(config: MetaRunConfig) -> tuple[list[Pair], Backbone]:
    """Return the pairs and the backbone.

    Raises:
        VlpromptError: Values, pairs, weights or a host that cannot be used.
    """
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    check_devices(config.trainer)
    pairs = load_pairs(config.pairs.source, root=config.pairs.root)
    backbone = configured_backbone(config.backbone, config.trainer)
    # Before any image is encoded: class-specific learnables, say, cannot be learned across tasks.
    host(config, backbone, ["one", "two"]).with_classes(["three", "four", "five"])
    return pairs, backbone


@dataclass(frozen=True)
class _Clustered:
    captions: list[str]
    images: Tensor
    texts: Tensor
    clusters: Clusters


def _clustered(config: MetaRunConfig, pairs: Sequence[Pair], backbone: Backbone) -> _Clustered:
    """Return captions, features (out of the feature store) and clusters of ``pairs``."""
    own = config.tasks
    captions = fit_captions(backbone.text, [pair.caption for pair in pairs], own.caption_tokens)
    images = image_features(
        pairs,
        backbone.preprocess,
        backbone.encode_image,
        fingerprint=backbone.fingerprint,
        device=backbone.device,
        workers=config.pairs.workers,
    ).features
    texts = caption_features(captions, lambda some: _encoded(backbone, some), fingerprint=backbone.fingerprint)
    looks = images if own.domain_features == "images" else without_caption(images, texts)
    clusters = cluster(looks, texts, topics=own.topics, domains=own.domains, least=own.least, seed=config.seed)
    return _Clustered(captions, images, texts, clusters)


def _sampler(config: MetaRunConfig, found: _Clustered) -> TaskSampler:
    own = config.tasks
    return TaskSampler(
        found.clusters,
        found.captions,
        support=own.support,
        query=own.query,
        labels=own.labels,
        classes=own.classes,
        seed=config.seed,
        caption_features=found.texts,
    )


def make_tasks(config: MetaRunConfig, pairs: Sequence[Pair], backbone: Backbone) -> Tasks:
    """Return the tasks that are drawn from ``pairs``.

    Raises:
        VlpromptError: Captions or settings that make no tasks.
    """
    found = _clustered(config, pairs, backbone)
    return Tasks(pairs, found.captions, found.images, found.clusters, _sampler(config, found))


@torch.no_grad()
def _encoded(backbone: Backbone, captions: Sequence[str]) -> Tensor:
    return backbone.text.encode(template_layout(backbone.text, captions, ["{}"]))[0]


def host(config: MetaRunConfig, backbone: Backbone, class_names: Sequence[str]) -> PromptMethod:
    """Return the method that is meta-trained; its class names are of no account, every task has its own.

    Raises:
        VlpromptError: A method that learns nothing by gradient steps.
    """
    pl.seed_everything(config.seed, verbose=False)
    method = create_method(
        config.method,
        backbone,
        class_names,
        objectives=config.objectives,
        decomposition=config.decomposition,
        **config.settings,
    )
    if not method.parameter_groups(config.meta.inner_lr):
        raise ConfigError(
            f"method is {config.method!r}, which takes no gradient steps over images; accepted: a prompt learner such "
            "as coop, cocoop, vpt, ivlp, maple, mocoop"
        )
    return method


def make_regulator(config: MetaRunConfig, method: PromptMethod) -> Regulator | None:
    """Return the regulator that ``config`` asks for, or None."""
    own = config.meta
    if own.regulator == "none":
        return None
    shapes = {name: tuple(prompt.shape) for name, prompt in method.prompt_tensors()}
    settings = RegulatorSettings(own.regulator, own.sharing, own.rank, own.bottleneck, own.gate_bias)
    return Regulator(shapes, method.backbone.embed_dim, settings)


def _data(config: MetaRunConfig, method: PromptMethod, tasks: Tasks) -> MetaData:
    images = None
    if method.learns_image_side:
        images = [Sample(pair.id, 0, pair.source) for pair in tasks.pairs]
    return MetaData(
        tasks.sampler.task,
        tasks.features,
        config.meta,
        images=images,
        preprocess=method.backbone.preprocess,
        workers=config.pairs.workers,
    )


def _inputs(config: MetaRunConfig, tasks: Tasks, backbone: Backbone) -> dict[str, str]:
    plain = dataclasses.asdict(config)
    for name in ("output", "name", "trainer"):
        del plain[name]
    del plain["pairs"]
    if not plain["decomposition"]:  # younger than meta-trainings that people have
        del plain["decomposition"]
    return {
        "configuration": sha256_json([plain, config.trainer.precision]),
        "set of pairs": sha256_json(
            [[pair.id, caption] for pair, caption in zip(tasks.pairs, tasks.captions, strict=True)]
        ),
        "backbone": backbone.fingerprint,
    }


__all__ = ["REGULATOR_FILE", "Tasks", "inspect", "make_tasks", "meta_folder", "meta_train"]
