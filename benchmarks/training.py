"""Training speed, memory and accuracy against Keras' own `fit`: `make bench-train`.

The two models of the recipes `report`, each against Keras' `fit` with its defaults (on a machine with CPUs alone those
mean no XLA; the figures say it). Contenders alternate, an epoch of one `fit` each by turns, each warm in a process of
its own; ratios are taken within a round, of whole epochs as one waits for them. What Keras would take without its wait
at an epoch's end stands beside it, and the ratio to that.

A rate of ours for VGG16's second stage counts the extraction of the frozen layers' outputs, spread over the recipe's
epochs; extraction is measured before the rounds. Neither side's tracing and compiling counts: it is paid once.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TextIO, cast

import numpy as np

from benchmarks.result import RESULTS_DIR, Result, Spread, Target, write
from ml.datasets import synthetic
from ml.datasets.cifar10 import load_cifar10
from ml.registry.provenance import code_state
from ml.settings import PROJECT_ROOT, load_settings
from ml.training.recipe import Recipe, load_recipe

logger = logging.getLogger("benchmarks.training")

VGG16_BOUND, BASELINE_BOUND = 8.0, 1.3
"""Times Keras' `fit` with its defaults."""
ACCURACY_BOUND = 0.03
"""Two standard errors or so of the difference between means over three seeds, on a thousand images."""
CACHE_BOUND = 0.01
"""The two ways compute the same in another order, and XLA draws other dropouts."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    baseline_rounds: int
    vgg16_rounds: int
    images: int
    """Of the rounds."""
    many_images: int
    """Of the second point of growth."""
    steps: int
    """Batches of Keras' epoch of VGG16 on the many images, which would take it five minutes."""
    seeds: int
    epochs: int
    learning_images: int
    """Of the comparison of accuracies; a third as many judge."""
    end_to_end_images: int
    """Of the proof that the cache changes nothing; half as many judge."""


FULL = Plan(
    baseline_rounds=5,
    vgg16_rounds=3,
    images=5_000,
    many_images=50_000,
    steps=40,
    seeds=3,
    epochs=3,
    learning_images=3_200,
    end_to_end_images=960,
)
QUICK = Plan(
    baseline_rounds=1,
    vgg16_rounds=1,
    images=512,
    many_images=768,
    steps=2,
    seeds=2,
    epochs=1,
    learning_images=192,
    end_to_end_images=64,
)


class Contender:
    """A process that measures a little when asked, and waits."""

    def __init__(self, name: str, job: Mapping[str, object]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training_contenders"],
            cwd=PROJECT_ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._in, self._out = cast(TextIO, self._process.stdin), cast(TextIO, self._process.stdout)
        self._write(json.dumps(job))

    def sample(self) -> dict[str, Any]:
        """What it measures next.

        Raises:
            RuntimeError: it ended; it said why on stderr.
        """
        line = self._out.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}; its last words stand above")
        sample: dict[str, Any] = json.loads(line)
        logger.info("%s: %s", self.name, _in_words(sample))
        return sample

    def go_on(self) -> None:
        """Lets it measure the next sample, or wait for the next job."""
        self._write("")

    def then(self, job: Mapping[str, object]) -> dict[str, Any]:
        """Another job, of one sample, behind one that is done."""
        self.go_on()
        self._write(json.dumps(job))
        return self.sample()

    def end(self) -> None:
        """Ends the process, and waits for that."""
        self._in.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()

    def _write(self, line: str) -> None:
        try:
            self._in.write(line + "\n")
            self._in.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}; its last words stand above") from error


@contextmanager
def contending(name: str, job: Mapping[str, object]) -> Iterator[Contender]:
    """A contender that ends with the block."""
    contender = Contender(name, job)
    try:
        yield contender
    finally:
        contender.end()


class Bench:
    """The measurements of one plan, on one file of images."""

    def __init__(self, plan: Plan, data: Path) -> None:
        self._plan, self._data = plan, str(data)
        self._baseline, self._vgg16 = load_recipe("baseline", "report"), load_recipe("vgg16", "report")

    def vgg16(self) -> tuple[dict[str, object], list[float]]:
        """Figures of VGG16's second stage, and the ratio to Keras' defaults in each round."""
        rounds = self._plan.vgg16_rounds
        top = self._top(rounds + 1)
        epochs = self._vgg16.stages[-1].epochs
        extraction, tail, plain, peak = self._alternate(top, rounds)
        # The prefix is charged to this stage alone, though the one before it leaves it in the cache.
        amortised = [1 / (1 / t + 1 / (epochs * e)) for e, t in zip(extraction, tail, strict=True)]
        figures = {
            "ours": {
                "images_per_second": Spread.of(amortised),
                "tail_alone": Spread.of(tail),
                "extraction": Spread.of(extraction),
                "epochs_that_share_an_extraction": epochs,
                "peak_memory_mib": peak,
            }
        }
        compared, ratios = self._compared(figures, amortised, plain)
        _, of_the_tail = self._compared({}, tail, plain)
        return {**compared, "ratio_of_the_tail_alone_over_keras_fit": Spread.of(of_the_tail)}, ratios

    def baseline(self) -> tuple[dict[str, object], list[float]]:
        """Figures of the baseline CNN, and the ratio to Keras' defaults in each round."""
        rounds = self._plan.baseline_rounds
        recipe = self._baseline.with_overrides({"stages.fit.epochs": rounds + 1})
        _, fit, plain, peak = self._alternate(recipe, rounds)
        figures = {"ours": {"images_per_second": Spread.of(fit), "peak_memory_mib": peak}}
        return self._compared(figures, fit, plain)

    def growth(self) -> dict[str, object]:
        """Rates and peak memory on ten times the images; those on the fewer are the rounds'."""
        plan = self._plan
        figures: dict[str, object] = {"images": plan.many_images}
        for name, recipe, steps in (
            ("baseline", self._baseline.with_overrides({"stages.fit.epochs": 2}), None),
            ("vgg16_stage_2", self._top(2), plan.steps),
        ):
            with contending(f"{name}, ours, {plan.many_images} images", self._job(recipe, plan.many_images)) as ours:
                mine = _warm(ours)
            with contending(
                f"{name}, keras_fit, {plan.many_images} images",
                self._plain_job(recipe, plan.many_images, steps),
            ) as keras_fit:
                plain = _warm(keras_fit)["fit"]
            figures[name] = {
                "ours": {
                    ("tail_alone" if "extraction" in mine else "images_per_second"): mine["fit"]["images_per_second"],
                    **({"extraction": mine["extraction"]["images_per_second"]} if "extraction" in mine else {}),
                    "peak_memory_mib": mine["fit"]["peak_memory_mib"],
                },
                "keras_fit": {
                    # Of the baseline a whole epoch like ours.
                    **({"images_per_second": plain["images_per_second"]} if steps is None else {}),
                    "between_batches": plain["between_batches"],
                    "peak_memory_mib": plain["peak_memory_mib"],
                },
            }
        return figures

    def accuracies(self) -> tuple[dict[str, object], Target]:
        """Validation accuracy per epoch of the baseline, ours and Keras', on the same images with the same recipe."""
        plan = self._plan
        # Statistics of so few steps: 0.99 would measure how far they have come, not the model.
        changed = {"stages.fit.epochs": plan.epochs, "model.batch_norm_momentum": 0.9}
        found: dict[str, list[list[float]]] = {"accuracy_ours": [], "accuracy_plain": []}
        first = self._accuracy_job("accuracy_ours", 0, changed)
        with (
            contending("accuracy, ours", first) as ours,
            contending("accuracy, keras_fit", {**first, "kind": "accuracy_plain"}) as plain,
        ):
            for seed in range(plan.seeds):
                for kind, contender in (("accuracy_ours", ours), ("accuracy_plain", plain)):
                    job = self._accuracy_job(kind, seed, changed)
                    sample = contender.then(job) if seed else contender.sample()
                    found[kind].append(sample["accuracies"])
        mine, theirs = ([mean(epochs) for epochs in found[kind]] for kind in ("accuracy_ours", "accuracy_plain"))
        # An epoch by itself: what one has too much in the first must not make up for what it lacks in the last.
        by_epoch = [
            mean(one) - mean(other)
            for one, other in zip(
                zip(*found["accuracy_ours"], strict=True), zip(*found["accuracy_plain"], strict=True), strict=True
            )
        ]
        figures = {
            "images": plan.learning_images,
            "validation_images": plan.learning_images // 3,
            "seeds": plan.seeds,
            "batch_norm_momentum": 0.9,
            "ours": _per_epoch(found["accuracy_ours"]),
            "keras_fit": _per_epoch(found["accuracy_plain"]),
            "difference_of_means_by_epoch": by_epoch,
            "mean_over_epochs_and_seeds": {"ours": mean(mine), "keras_fit": mean(theirs)},
            "range_over_seeds": {"ours": max(mine) - min(mine), "keras_fit": max(theirs) - min(theirs)},
        }
        name = "baseline, validation accuracy of each epoch: largest distance from plain Keras fit"
        return figures, Target(name, max(abs(difference) for difference in by_epoch), "<=", ACCURACY_BOUND)

    def cache_changes_nothing(self) -> tuple[dict[str, object], Target]:
        """VGG16's second stage from one seed, on cached features and end to end."""
        plan = self._plan
        recipe = self._top(3).with_overrides({"stages.top.learning_rate": 1e-4})
        job = {
            **self._job(recipe, plan.end_to_end_images),
            "kind": "accuracy_ours",
            "validation": max(plan.end_to_end_images // 2, 32),
        }
        with contending("the cached tail", job) as contender:
            cached = contender.sample()
            whole = contender.then({**job, "end_to_end": True})
        figures = {
            "images": plan.end_to_end_images,
            "validation_images": job["validation"],
            "cached_from": cached["cached_from"],
            "learning_rate": recipe.stages[0].learning_rate,
            "cached": {"validation_accuracy": cached["accuracies"], "validation_loss": cached["losses"]},
            "end_to_end": {"validation_accuracy": whole["accuracies"], "validation_loss": whole["losses"]},
        }
        name = "VGG16 stage 2, validation accuracy: distance of the cached training from end to end"
        return figures, Target(name, abs(cached["accuracies"][-1] - whole["accuracies"][-1]), "<=", CACHE_BOUND)

    def _top(self, epochs: int) -> Recipe:
        """VGG16's second stage alone."""
        stage = self._vgg16.stages[-1].model_copy(update={"epochs": epochs})
        return self._vgg16.model_copy(update={"stages": (stage,)})

    def _job(self, recipe: Recipe, images: int) -> dict[str, object]:
        job = {"recipe": recipe.model_dump(mode="json"), "data": self._data, "images": images}
        return {**job, "kind": "ours", "chunks": self._plan.vgg16_rounds + 1}

    def _plain_job(self, recipe: Recipe, images: int, steps: int | None = None) -> dict[str, object]:
        """For plain Keras; `steps` None is whole epochs."""
        return {**self._job(recipe, images), "kind": "plain", "steps": steps}

    def _accuracy_job(self, kind: str, seed: int, changed: Mapping[str, object]) -> dict[str, object]:
        images = self._plan.learning_images
        recipe = self._baseline.with_overrides({**changed, "seed": seed})
        return {**self._job(recipe, images), "kind": kind, "validation": images // 3}

    def _alternate(self, recipe: Recipe, rounds: int) -> tuple[list[float], list[float], list[dict[str, Any]], float]:
        """Rounds of ours and plain Keras by turns.

        Returns:
            Ours: images per second of the extraction (empty where nothing is frozen) and of the fit, one a round; the
            plain contender's samples, one beside each fit; our peak memory in MiB.
        """
        images, peak = self._plan.images, 0.0
        plain: list[dict[str, Any]] = []
        mine: dict[str, list[float]] = {"extraction": [], "fit": []}
        with (
            contending(f"{recipe.architecture}, ours", self._job(recipe, images)) as ours,
            contending(f"{recipe.architecture}, keras_fit", self._plain_job(recipe, images)) as keras_fit,
        ):
            for contender in (ours, keras_fit):
                contender.sample()  # warm
            while len(mine["fit"]) < rounds:
                ours.go_on()
                sample = ours.sample()
                peak = sample["peak_memory_mib"]
                if sample["first"]:
                    continue
                mine[sample["kind"]].append(sample["images_per_second"])
                if sample["kind"] == "fit":
                    keras_fit.go_on()
                    plain.append(keras_fit.sample())
        return mine["extraction"], mine["fit"], plain, peak

    def _compared(
        self, figures: dict[str, Any], mine: Sequence[float], plain: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, object], list[float]]:
        """Adds plain Keras' figures and the ratios, round by round."""
        ratios = {
            rate: [ours / sample[rate] for ours, sample in zip(mine, plain, strict=True)]
            for rate in ("images_per_second", "between_batches")
        }
        figures["keras_fit"] = {
            **{rate: Spread.of([sample[rate] for sample in plain]) for rate in ratios},
            "xla": plain[-1]["xla"],
            "peak_memory_mib": plain[-1]["peak_memory_mib"],
        }
        figures["ratio"] = Spread.of(ratios["images_per_second"])
        figures["ratio_without_keras_wait"] = Spread.of(ratios["between_batches"])
        return {"images": self._plan.images, "rounds": len(mine), **figures}, ratios["images_per_second"]


def run(plan: Plan, data: Path, kind: str) -> Result:
    """All of it.

    Args:
        plan: how much.
        data: folder with `images.npy`, uint8 (m, 32, 32, 3), and `labels.npy`, int64 (m,).
        kind: what those are, `cifar-10` or `SYNTHETIC`.
    """
    bench = Bench(plan, data)
    vgg16, vgg16_ratios = bench.vgg16()
    baseline, baseline_ratios = bench.baseline()
    accuracies, equal = bench.accuracies()
    cached, same = bench.cache_changes_nothing()
    return Result(
        name="training",
        n=min(len(vgg16_ratios), len(baseline_ratios)),
        data=kind,
        figures={
            "vgg16_stage_2": vgg16,
            "baseline": baseline,
            "baseline_accuracy": accuracies,
            "vgg16_stage_2_cached_or_end_to_end": cached,
            "growth": bench.growth(),
        },
        targets=(
            Target(
                "VGG16 stage 2, images per second, over plain Keras fit",
                Spread.of(vgg16_ratios).median,
                ">=",
                VGG16_BOUND,
            ),
            Target(
                "baseline, images per second, over plain Keras fit",
                Spread.of(baseline_ratios).median,
                ">=",
                BASELINE_BOUND,
            ),
            equal,
            same,
        ),
    )


def save_images(folder: Path, count: int, quick: bool) -> str:
    """Writes `count` training images for the contenders to map, outside the repository; says what they are."""
    settings = load_settings()
    if quick or settings.cifar10_source == "synthetic":
        raw = synthetic.generate(train=count, test=10)
    else:
        raw = load_cifar10(settings.cifar10_source, settings.cache_dir, allow_stand_in=False)
    order = np.random.default_rng(0).permutation(len(raw.train_labels))[:count]
    np.save(folder / "images.npy", raw.train_images[order])
    np.save(folder / "labels.npy", raw.train_labels[order])
    return raw.data


def _in_words(sample: Mapping[str, object]) -> str:
    return ", ".join(
        f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in sample.items()
    )


def _warm(contender: Contender) -> dict[str, dict[str, Any]]:
    """The last sample of each kind, up to the first epoch that is not its contender's first."""
    samples: dict[str, dict[str, Any]] = {}
    while True:
        sample = contender.sample()
        samples[sample["kind"]] = sample
        if sample["kind"] == "fit" and not sample["first"]:
            return samples
        contender.go_on()


def _per_epoch(runs: Sequence[Sequence[float]]) -> list[Spread]:
    return [Spread.of(epoch) for epoch in zip(*runs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; needs --output")
    parser.add_argument("--output", type=Path, help=f"the file to write (default {RESULTS_DIR.name}/training.json)")
    asked = parser.parse_args()
    if asked.quick and asked.output is None:
        parser.error("--quick measures nothing worth keeping: say where to write it, with --output")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    began, code = time.monotonic(), code_state(PROJECT_ROOT)
    plan = QUICK if asked.quick else FULL
    with tempfile.TemporaryDirectory(prefix="bench-images-") as folder:
        kind = save_images(Path(folder), plan.many_images, asked.quick)
        result = run(plan, Path(folder), kind)
    if code_state(PROJECT_ROOT) != code:
        raise SystemExit(
            "The code changed while it was measured: nothing was written. Run it again, and leave it alone."
        )
    path = asked.output or RESULTS_DIR / "training.json"
    write(result, path)
    for target in result.targets:
        print(
            f"{'holds' if target.holds else 'FAILS'}: {target.name}: {target.value:.3f} {target.op} {target.bound:.3f}"
        )
    print(f"{path}, {result.data} images, after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
