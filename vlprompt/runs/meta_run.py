"""Meta-training runs: topics, domains and tasks from pairs, then a learned initialisation and a regulator."""

from __future__ import annotations

import dataclasses
import shlex
import time
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vlprompt._dist import is_main_process
from vlprompt._files import sha256_json, write_json, write_text
from vlprompt.backbone import Backbone
from vlprompt.config.keys import as_plain
from vlprompt.config.meta import MetaRunConfig
from vlprompt.datasets.images import contents_of
from vlprompt.datasets.records import Sample
from vlprompt.engine.callbacks import read_metrics
from vlprompt.engine.fit import METRICS, check_devices, check_precision, fit, make_trainer
from vlprompt.engine.memory import peak_memory
from vlprompt.engine.meta_data import MetaData
from vlprompt.engine.meta_module import MetaModule
from vlprompt.errors import ConfigError
from vlprompt.io.head import Head, backbone_facts, preprocess_facts
from vlprompt.io.regulators import REGULATOR_FILE, save_regulator
from vlprompt.meta import Regulator, RegulatorSettings
from vlprompt.meta.clustering import Clusters, cluster, without_caption
from vlprompt.meta.inspection import inspection_page
from vlprompt.meta.tasks import TaskSampler, fit_captions
from vlprompt.methods import PromptMethod, create_method
from vlprompt.pairs.features import caption_features, image_features
from vlprompt.pairs.load import Pair, load_pairs
from vlprompt.prompts import text_layout
from vlprompt.runs.effect import note, without_idle_meta
from vlprompt.runs.folder import HEAD, RESULTS, opened, read_json, versions
from vlprompt.runs.session import configured_backbone, load_parts

SCHEMA = 1
CLUSTERS, INSPECTION = "clusters.safetensors", "inspect.html"
RECONSTRUCTION = "GRAM-R, a reconstruction: the method section of arXiv 2303.06571 is not available"


class MetaSession:
    """The objects of one meta-training, each created once, on first use.

    Args:
        config: The configuration.
    """

    def __init__(self, config: MetaRunConfig) -> None:
        self.config, idle = without_idle_meta(config)
        if idle:
            warnings.warn(note(idle), stacklevel=2)

    def load(self) -> None:
        """Load pairs and backbone, and check the method before any image is encoded.

        Raises:
            VlpromptError: Values, pairs, weights or the method cannot be used.
        """
        check_devices(self.config.trainer)
        check_precision(self.config.backbone, self.config.trainer)
        load_parts(self, "pairs", "backbone")
        # Class-specific parameters, for example, cannot be learned across tasks.
        host(self.config, self.backbone, ["one", "two"]).with_classes(["three", "four", "five"])

    @property
    def folder(self) -> Path:
        """The folder of the meta-training."""
        return meta_folder(self.config)

    @cached_property
    def pairs(self) -> list[Pair]:
        """The N pairs."""
        return load_pairs(self.config.pairs.source, root=self.config.pairs.root)

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen CLIP, on the device of this process."""
        return configured_backbone(self.config.backbone, self.config.trainer)

    # -- tasks ------------------------------------------------------------------------------------------------------
    @cached_property
    def captions(self) -> list[str]:
        """The captions of the pairs, as used in prompts."""
        return fit_captions(self.backbone.text, [pair.caption for pair in self.pairs], self.config.tasks.caption_tokens)

    @cached_property
    def image_features(self) -> Tensor:
        """Raw frozen image features ``[N, D]``, from the feature store."""
        backbone = self.backbone
        return image_features(
            self.pairs,
            backbone.preprocess,
            backbone.encode_image,
            fingerprint=backbone.fingerprint,
            device=backbone.device,
            workers=self.config.pairs.workers,
        ).features

    @cached_property
    def caption_features(self) -> Tensor:
        """Features of the captions ``[N, D]``, from the feature store."""
        backbone = self.backbone
        return caption_features(self.captions, lambda some: _encoded(backbone, some), fingerprint=backbone.fingerprint)

    @cached_property
    def clusters(self) -> Clusters:
        """Topics and domains."""
        tasks, images, texts = self.config.tasks, self.image_features, self.caption_features
        looks = images if tasks.domain_features == "images" else without_caption(images, texts)
        return cluster(
            looks, texts, topics=tasks.topics, domains=tasks.domains, least=tasks.least, seed=self.config.seed
        )

    @cached_property
    def sampler(self) -> TaskSampler:
        """The tasks.

        Raises:
            ConfigError: No topic has enough pairs for tasks.
        """
        tasks = self.config.tasks
        return TaskSampler(
            self.clusters,
            self.captions,
            support=tasks.support,
            query=tasks.query,
            labels=tasks.labels,
            classes=tasks.classes,
            seed=self.config.seed,
            caption_features=self.caption_features,
        )

    def words(self) -> str:
        """Return a description of the tasks."""
        usable = self.sampler.usable
        return f"{len(usable)} topics with {sum(map(len, usable.values()))} visual domains"

    def topic_names(self) -> list[str]:
        """Return one caption per topic, used as the topic's class name."""
        first: dict[int, str] = {}
        for topic, caption in zip(self.clusters.topic.tolist(), self.captions, strict=True):
            first.setdefault(topic, caption)
        return list(dict.fromkeys(first.values()))

    # -- trained objects --------------------------------------------------------------------------------------------
    @cached_property
    def method(self) -> PromptMethod:
        """The method to meta-train; the seed is set before it is created."""
        return host(self.config, self.backbone, self.topic_names())

    @cached_property
    def regulator(self) -> Regulator | None:
        """The regulator of the configuration, if any; the seed is set before it is created."""
        meta = self.config.meta
        method = self.method
        pl.seed_everything(self.config.seed, verbose=False)
        if meta.regulator == "none":
            return None
        shapes = {name: tuple(prompt.shape) for name, prompt in method.prompt_tensors()}
        settings = RegulatorSettings(meta.regulator, meta.sharing, meta.rank, meta.bottleneck, meta.gate_bias)
        return Regulator(shapes, method.backbone.embed_dim, settings)

    def data(self) -> MetaData:
        """Return the batches of tasks: features, or images if the method learns on the image side."""
        method = self.method
        images = [Sample(pair.id, 0, pair.source) for pair in self.pairs] if method.needs.images else None
        return MetaData(
            self.sampler.task,
            self.image_features,
            self.config.meta,
            images=images,
            preprocess=method.backbone.preprocess,
            workers=self.config.pairs.workers,
        )

    def inputs(self) -> dict[str, str]:
        """Return the checksums of the inputs of the meta-training."""
        plain = dataclasses.asdict(self.config)
        for name in ("output", "name", "trainer", "pairs"):
            del plain[name]
        if not plain["decomposition"]:  # a key that older meta-trainings do not have
            del plain["decomposition"]
        captioned = zip(self.pairs, self.captions, strict=True)
        contents = contents_of([pair.source for pair in self.pairs])
        return {
            "configuration": sha256_json([plain, self.config.trainer.precision]),
            "set of pairs": sha256_json([[pair.id, caption] for pair, caption in captioned]),
            "backbone": self.backbone.fingerprint,
            "preprocessing": sha256_json(preprocess_facts(self.backbone)),
            **({} if contents is None else {"content of the images": sha256_json(contents)}),
        }


def meta_folder(config: MetaRunConfig) -> Path:
    """Return ``output/gram/<name>``."""
    name = config.name or f"{config.method}-{Path(config.pairs.source).stem}"
    return Path(config.output) / "gram" / name


def meta_train(config: MetaRunConfig, *, force: bool = False) -> tuple[Path, dict[str, Any]]:
    """Meta-train as configured; resume an unfinished run, reuse a finished run.

    Args:
        config: The configuration.
        force: Start again even if the run exists.

    Returns:
        The run folder, for ``--init_from gram:FOLDER`` (initialisation and regulator) or ``--init_from FOLDER``, and
        its results.

    Raises:
        VlpromptError: Pairs, weights, settings or values cannot be used.
    """
    session = MetaSession(config)
    config = session.config
    session.load()
    clusters, words = session.clusters, session.words()
    folder, method, regulator = session.folder, session.method, session.regulator
    inputs_sha256 = sha256_json(session.inputs())
    with opened(folder, as_plain(config), session.inputs(), force=force):
        known = None if force else read_json(folder / RESULTS)
        if known is not None:
            if known.get("inputs_sha256", inputs_sha256) != inputs_sha256 or not isinstance(known.get("last"), dict):
                path = folder / RESULTS
                raise ConfigError(
                    f"{path} is damaged, or holds the results of another run.\nTo make them again, move it aside: "
                    f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}"
                )
            return folder, known
        if is_main_process():
            clusters.save(folder / CLUSTERS)
        started = time.monotonic()
        meta = config.meta
        with peak_memory(session.backbone.device) as peak:
            accumulate = meta.tasks_per_step // config.trainer.devices
            trainer = make_trainer(
                dataclasses.replace(config.trainer, accumulate=accumulate), folder, meta.steps // meta.save_every
            )
            fit(trainer, MetaModule(method, regulator, meta), session.data(), folder, inputs_sha256)
        results = {
            "schema": SCHEMA,
            "what": RECONSTRUCTION,
            "config": as_plain(config),
            "inputs_sha256": inputs_sha256,
            "backbone": backbone_facts(session.backbone),
            "pairs": len(session.pairs),
            "tasks": words,
            "versions": versions(),
            "last": read_metrics(folder / METRICS)[-1],
            "train": {"seconds": round(time.monotonic() - started, 1), "peak_mb": peak.megabytes},
        }
        if is_main_process():
            facts = {
                "run": folder.name,
                "inputs_sha256": inputs_sha256,
                "data": {"pairs": config.pairs.source},
                "what": RECONSTRUCTION,
            }
            Head(method, facts).save_pretrained(folder / HEAD)
            if regulator is not None:
                save_regulator(regulator, folder, inputs_sha256)
            write_json(folder / RESULTS, results)  # last, because it marks the run as finished
        return folder, results


def inspect(config: MetaRunConfig) -> Path:
    """Write a page of topics, domains and tasks with thumbnails and return its path; nothing is trained.

    Raises:
        VlpromptError: As :func:`meta_train`. If no topic has enough pairs for tasks, the page is still written.
    """
    session = MetaSession(config)
    session.load()
    clusters = session.clusters
    problem: ConfigError | None = None
    sampler = None
    try:
        sampler = session.sampler
    except ConfigError as error:
        problem = error
    picture = [pair.source.open for pair in session.pairs]
    page = inspection_page(clusters, sampler, session.captions, lambda row: picture[row]())
    path = session.folder / INSPECTION
    write_text(path, page)
    if problem is not None:
        raise ConfigError(f"{problem}\nWhat there is can be seen in {path}") from problem
    return path


@torch.no_grad()
def _encoded(backbone: Backbone, captions: Sequence[str]) -> Tensor:
    return backbone.text.encode(text_layout(backbone.text, captions))[0]


def host(config: MetaRunConfig, backbone: Backbone, class_names: Sequence[str]) -> PromptMethod:
    """Return the method to meta-train; its class names do not matter, since each task has different ones.

    Raises:
        VlpromptError: The method is not trained by gradient steps.
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


__all__ = ["REGULATOR_FILE", "MetaSession", "host", "inspect", "meta_folder", "meta_train"]
