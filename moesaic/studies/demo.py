"""The whole path on one small machine: a real dense model becomes a mixture of experts.

SmolLM2-135M-Instruct is unpacked, upcycled, proved equal, trained on the source of Python's
standard library, measured on files that training never saw, rounded to FP8, asked a
question at every stage, and shown on one HTML page. The dense model is trained on the very
same tokens as well: without that control a gain could be the text's and not the MoE's.

Every stage is a job that the command line has too, and leaves a folder:

    dense/      SmolLM2, or with `quick` a tiny model of random weights
    upcycled/   its MoE, with proof.json
    tokens/     the text as tokens, training and held-out
    trained/    run folder of the MoE; model/ in it, and what the page is made of
    control/    run folder of the dense model on the same tokens
    fp8/        the trained MoE in FP8
    stages/     what every stage was asked, what it found, how long it took (`stages`)
    report.html

The text is that of the Python that runs this: always there, and under the PSF licence.
"""

from __future__ import annotations

import json
import platform
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moesaic.config import to_toml
from moesaic.data.config import PrepareConfig, SourceConfig
from moesaic.data.prepare import prepare
from moesaic.evaluation.config import EvaluateConfig
from moesaic.evaluation.evaluate import evaluate
from moesaic.files import write_text_atomic
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from moesaic.reporting.config import ReportConfig
from moesaic.reporting.report import report
from moesaic.serving.config import GenerateConfig, SamplingConfig
from moesaic.serving.generate import generate
from moesaic.studies.config import DemoConfig
from moesaic.studies.smollm2 import smollm2_folder
from moesaic.studies.stages import Done, Stage, run_stages
from moesaic.studies.tiny import tiny_folder
from moesaic.training.config import (
    CheckpointConfig,
    MetricsConfig,
    OptimizerConfig,
    TrainConfig,
    TrainDataConfig,
)
from moesaic.training.schedule import ScheduleConfig
from moesaic.training.train import train
from moesaic.upcycling.config import UpcycleConfig
from moesaic.upcycling.upcycle import upcycle

LABELS = ("dense", "upcycled", "trained", "dense, trained on the same tokens", "trained, FP8")

LICENCE = "PSF-2.0"
"""Of the Python standard library."""

SMOLLM2_TOKENS = 2e12
"""Tokens that SmolLM2-135M was trained on, as its makers say (arXiv 2502.02737)."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    sequence_length: int
    micro_batch: int
    glob: tuple[str, ...]
    """Files of the standard library to read."""
    heldout_documents: int
    """Files that training never sees."""
    heldout_sequences: int
    """Rows of them on which loss is measured."""
    proof_tokens: int
    answer_tokens: int


FULL = Scale(
    sequence_length=512,
    micro_batch=4,
    glob=("*.py",),
    heldout_documents=16,
    heldout_sequences=24,
    proof_tokens=512,
    answer_tokens=48,
)
QUICK = Scale(
    sequence_length=32,
    micro_batch=2,
    glob=("[a-c]*.py",),
    heldout_documents=2,
    heldout_sequences=8,
    proof_tokens=64,
    answer_tokens=8,
)


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the whole path, or what is missing of it.

    Returns:
        `report` (path of the page); `stages` (for each its seconds, peak memory in bytes and
        whether it was there already); `seconds` and `peak_memory_bytes` of all; `data` (what the
        text is, its licence, and how much was read and held out);
        `largest_logit_difference` of the upcycled model to the dense one; `verdict` (whether to
        upcycle at all); `heldout` (a row a model, as `evaluate` gives) and `heldout_tokens`;
        `gain` (nats a token that the trained MoE is below the dense model),
        `gain_of_control` (that the dense model trained alike is), `fp8_cost` (that FP8 is above
        the trained MoE); `bytes` and `fp8_bytes` of their weights; and `answers`.

    Raises:
        ConfigError: A package is missing, or the numbers do not fit.
        FolderError: Something under `out` was not made by a demo, or cannot be written.
        TrainingError: A loss is not finite.
        KeyboardInterrupt: Training was asked to stop; the same command goes on from there.
    """
    stages = _Path(config).stages()
    done = run_stages(stages, config.out / "stages")
    return _summary(config, stages, done)


class _Path:
    """The stages of one demo and the folders between them."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.scale = QUICK if config.quick else FULL
        out = config.out
        self.dense, self.upcycled, self.tokens = out / "dense", out / "upcycled", out / "tokens"
        self.trained, self.control, self.fp8 = out / "trained", out / "control", out / "fp8"
        self.models = (
            self.dense,
            self.upcycled,
            self.trained / "model",
            self.control / "model",
            self.fp8,
        )

    def stages(self) -> list[Stage]:
        return [
            self._unpack(),
            self._upcycle(),
            self._prepare(),
            self._train("trained", "the mixture of experts", self.upcycled, self.trained),
            self._train("control", "the dense model, as a control", self.dense, self.control),
            self._quantize(),
            self._evaluate(),
            self._ask(),
            self._report(),
        ]

    def _unpack(self) -> Stage:
        def run() -> dict[str, Any]:
            write = tiny_folder if self.config.quick else smollm2_folder
            return {"folder": str(write(self.dense))}

        what = "a tiny random model" if self.config.quick else "SmolLM2-135M-Instruct"
        return Stage(name="dense", title=f"Unpack {what}", makes=self.dense, asked=what, run=run)

    def _upcycle(self) -> Stage:
        tokens = self.config.steps * self.scale.micro_batch * self.scale.sequence_length
        job = UpcycleConfig(
            dense=self.dense,
            out=self.upcycled,
            experts=self.config.experts,
            top_k=self.config.top_k,
            gate_norm_scale=1.0,
            seed=self.config.seed,
            proof_tokens=self.scale.proof_tokens,
            dense_tokens=None if self.config.quick else SMOLLM2_TOKENS,
            moe_tokens=None if self.config.quick else float(tokens),
        )
        return Stage(
            name="upcycled",
            title=f"Make {job.experts} experts of every MLP, and prove the model the same",
            makes=self.upcycled,
            asked=to_toml(job),
            needs=("dense",),
            run=lambda: upcycle(job),
        )

    def _prepare(self) -> Stage:
        source = SourceConfig(
            name="python",
            path=Path(sysconfig.get_path("stdlib")),
            kind="code",
            glob=self.scale.glob,
            licence=LICENCE,
            undecodable="skip",
        )
        job = PrepareConfig(
            tokenizer=self.dense,
            out=self.tokens,
            sources=(source,),
            sequence_length=self.scale.sequence_length,
            heldout_documents=self.scale.heldout_documents,
            seed=self.config.seed,
        )
        return Stage(
            name="tokens",
            title="Turn Python's standard library into tokens",
            makes=self.tokens,
            asked=to_toml(job),
            needs=("dense",),
            run=lambda: prepare(job),
        )

    def _train(self, name: str, what: str, model: Path, run_folder: Path) -> Stage:
        job = TrainConfig(
            model=model,
            run=run_folder,
            data=TrainDataConfig(tokens=self.tokens, micro_batch=self.scale.micro_batch),
            steps=self.config.steps,
            seed=self.config.seed,
            optimizer=OptimizerConfig(lr=self.config.lr),
            schedule=ScheduleConfig(warmup_steps=min(2, self.config.steps)),
            # One is 8 GB of weights and moments: written only when training is asked to stop.
            checkpoint=CheckpointConfig(every=0, keep=1, at_end=False),
            metrics=MetricsConfig(similarity_every=self.config.steps, log_every=1),
        )

        def run() -> Mapping[str, Any]:
            summary = train(job)
            if summary["model"] is None:
                raise KeyboardInterrupt
            shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
            return summary

        return Stage(
            name=name,
            title=f"Train {what}, for {job.steps} steps",
            makes=run_folder,
            asked=to_toml(job),
            needs=("upcycled" if name == "trained" else "dense", "tokens"),
            is_resumable=True,
            run=run,
        )

    def _quantize(self) -> Stage:
        job = QuantizeConfig(model=self.trained / "model", out=self.fp8)
        return Stage(
            name="fp8",
            title="Round the trained model to FP8",
            makes=self.fp8,
            asked=to_toml(job),
            needs=("trained",),
            run=lambda: quantize(job),
        )

    def _evaluate(self) -> Stage:
        job = EvaluateConfig(
            models=self.models,
            labels=LABELS,
            data=self.tokens,
            max_sequences=self.scale.heldout_sequences,
            batch_size=self.scale.micro_batch,
            out=self.trained / "evaluation.json",
        )
        return Stage(
            name="heldout",
            title="Measure loss on files that training never saw",
            makes=self.trained / "evaluation.json",
            asked=to_toml(job),
            needs=("dense", "upcycled", "tokens", "trained", "control", "fp8"),
            run=lambda: evaluate(job),
        )

    def _ask(self) -> Stage:
        question = self.config.question
        path = self.trained / "samples.json"
        sampling = SamplingConfig(max_new_tokens=self.scale.answer_tokens)

        def run() -> dict[str, Any]:
            answers = [
                {"prompt": question, "model": label, "text": _answer(folder, question, sampling)}
                for label, folder in zip(LABELS, self.models, strict=True)
            ]
            write_text_atomic(path, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
            return {"answers": answers}

        return Stage(
            name="answers",
            title=f"Ask every model: {question}",
            makes=path,
            asked=f"{question}\n{to_toml(sampling)}",
            needs=("dense", "upcycled", "trained", "control", "fp8"),
            run=run,
        )

    def _report(self) -> Stage:
        job = ReportConfig(run=self.trained, out=self.config.out / "report.html")
        assert job.out is not None, f"{job=}"
        return Stage(
            name="report",
            title="Draw the report",
            makes=job.out,
            asked=to_toml(job),
            needs=("trained", "heldout", "answers"),
            run=lambda: report(job),
        )


def _answer(folder: Path, question: str, sampling: SamplingConfig) -> str:
    given = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    text: str = generate(GenerateConfig(model=folder, prompt=question, **given))["text"]
    return text


def _summary(config: DemoConfig, stages: list[Stage], done: Mapping[str, Done]) -> dict[str, Any]:
    heldout = done["heldout"].result
    models = {row["label"]: row for row in heldout["models"]}
    dense, _, trained, control, fp8 = (models[label]["loss"] for label in LABELS)
    scale = QUICK if config.quick else FULL
    peaks = [item.peak_memory_bytes for item in done.values()]
    return {
        "stages": [
            {
                "name": stage.name,
                "seconds": done[stage.name].seconds,
                "peak_memory_bytes": done[stage.name].peak_memory_bytes,
                "was_there": done[stage.name].was_skipped,
            }
            for stage in stages
        ],
        "seconds": sum(item.seconds for item in done.values()),
        "peak_memory_bytes": None if None in peaks else max(peak for peak in peaks if peak),
        "data": {
            "what": f"source of Python {platform.python_version()}'s standard library",
            "licence": LICENCE,
            "seen_tokens": config.steps * scale.micro_batch * scale.sequence_length,
            **{split: done["tokens"].result[split] for split in ("train", "heldout")},
        },
        "largest_logit_difference": done["upcycled"].result["proof"]["logits"][
            "largest_difference"
        ],
        "verdict": done["upcycled"].result["verdict"],
        "heldout": heldout["models"],
        "heldout_tokens": heldout["tokens"],
        "gain": dense - trained,
        "gain_of_control": dense - control,
        "fp8_cost": fp8 - trained,
        "bytes": done["fp8"].result["bytes_before"],
        "fp8_bytes": done["fp8"].result["bytes_after"],
        "answers": done["answers"].result["answers"],
        "report": str(config.out / "report.html"),
    }
