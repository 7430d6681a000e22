"""The `cifar10` command: one subcommand per workflow.

With `--json` stdout carries one JSON object and nothing else; progress goes to stderr.
Exit codes: 0 done, 1 the work failed, 2 bad usage.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

# TensorFlow reads it once, when it is imported; its start-up messages are no progress.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from ml.errors import CifarError, ConfigurationError, RegistryUnavailable
from ml.settings import Settings, load_settings
from ml.traffic import Mode
from ml.training.recipe import PRETRAINING_RECIPE

app = typer.Typer(
    help="Trains, promotes, serves and watches CIFAR-10 classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
DatasetId = Annotated[str | None, typer.Option("--dataset", help="Dataset id; the newest dataset where none is given.")]


class Alias(StrEnum):
    """The roles that a version may have."""

    champion = "champion"
    challenger = "challenger"
    previous = "previous"


class Format(StrEnum):
    """How predictions are printed."""

    table = "table"
    json = "json"
    csv = "csv"


class Engine(StrEnum):
    """The forms in which a version can serve."""

    fp32 = "fp32"
    int8 = "int8"


class Architecture(StrEnum):
    """The models that can be trained."""

    baseline = "baseline"
    vgg16 = "vgg16"


def _run(
    work: Callable[[Settings], dict[str, Any]],
    *,
    as_json: bool,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Reads the settings, does the work, shows its result; errors become a message, a fix and an exit code."""
    _log_to_stderr()
    try:
        result = work(load_settings())
    except CifarError as error:
        _fail(error, as_json=as_json)
    except Exception as error:
        # A fault of ours: the trace for us, and still one JSON object for a program that waits for it.
        logging.getLogger("ml").exception("An error that this program did not foresee")
        unforeseen = CifarError(f"{type(error).__name__}: {error}", fix="report it with the trace on stderr.")
        _fail(unforeseen, as_json=as_json)
    if as_json:
        print(json.dumps(result))
    else:
        (show or _print_result)(result)
    sys.stdout.flush()  # a reader that left is met here, where typer ends the command for it, and not at the exit
    return result


def _fail(error: CifarError, *, as_json: bool) -> NoReturn:
    if as_json:
        body = {"type": type(error).__name__, "message": error.message, "fix": error.fix}
        print(json.dumps({"error": body}))
    else:
        console = Console(stderr=True)
        console.print(f"[bold red]{type(error).__name__}[/]", end=" ")
        console.print(error.message, markup=False, highlight=False)
        console.print("[bold]Fix[/]", end=" ")
        console.print(error.fix, markup=False, highlight=False)
    raise typer.Exit(2 if isinstance(error, ConfigurationError) else 1) from error


def _log_to_stderr() -> None:
    """A line per step: coloured on a terminal, plain with a time elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(
            console=Console(stderr=True), show_path=False, show_level=False, omit_repeated_times=False
        )
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("ml")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


def _print_result(result: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for key, value in result.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        table.add_row(key, shown)
    Console().print(table)


@app.command()
def ingest(
    source: Annotated[
        str | None, typer.Option(help="Overrides CIFAR10_SOURCE: a path, a URL, auto or synthetic.")
    ] = None,
    csv: Annotated[bool, typer.Option(help="Export CSV as well.")] = True,
    explore: Annotated[bool, typer.Option(help="Draw the exploration page as well; needs MLflow.")] = True,
    as_json: AsJson = False,
) -> None:
    """Fetch, verify, check, split and store CIFAR-10 as a versioned dataset."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows import ingest as workflow

        result = workflow.ingest(settings, source)
        dataset_id = str(result["dataset_id"])
        if csv:
            result["csv"] = workflow.export_csv(settings, dataset_id)
        if explore:
            try:
                result["exploration"] = workflow.explore(settings, dataset_id)
            except RegistryUnavailable as error:
                raise RegistryUnavailable(
                    f"Dataset {dataset_id} is stored, but its exploration could not be logged: {error.message}",
                    fix="start MLflow (`make up`) and run this again, or leave that step out with --no-explore.",
                ) from error
        return result

    _run(work, as_json=as_json)


@app.command()
def train(
    architecture: Annotated[Architecture, typer.Argument(help="The model to train.")],
    *,
    recipe: Annotated[str, typer.Option(help="A recipe of recipes/: report, best, demo, or your own.")] = "report",
    dataset: DatasetId = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the recipe's.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of this training, which was cut off.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model by a recipe, evaluate it and register it as a candidate."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.training_choice import choose, train

        chosen = choose(settings, architecture.value, dataset_id=dataset, recipe=recipe)
        return train(
            settings,
            architecture.value,
            dataset_id=chosen["dataset_id"],
            recipe=chosen["recipe"],
            seed=seed,
            resume="required" if resume else "no",
        )

    _run(work, as_json=as_json)


@app.command()
def sweep(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe's file that says what to search, as recipes/sweeps/baseline.toml does.")
    ],
    trials: Annotated[
        int | None, typer.Option(min=1, help="Bring so many trials to an end in all, instead of the file's number.")
    ] = None,
    dataset: DatasetId = None,
    as_json: AsJson = False,
) -> None:
    """Search for better hyperparameters; run again after an interruption, it goes on where it was."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.sweep import sweep as workflow

        return workflow(settings, recipe, dataset_id=dataset, trials=trials)

    _run(work, as_json=as_json)


@app.command()
def reproduce(
    run_id: Annotated[str, typer.Argument(help="The MLflow run of a finished training.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with one that was cut off.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a finished run again, by its own recipe on its own data, and see that every figure comes out the same."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows import reproduce as workflow

        original = workflow.original(settings, run_id)
        from ml.workflows.training_choice import use_backend

        use_backend(settings.keras_backend)
        # After what can be refused at once: these import Keras, which takes ten seconds.
        from ml.models.vgg16_weights import resolve_weights
        from ml.workflows.train import train

        return workflow.reproduce(settings, original, train=train, resolve_weights=resolve_weights, resume=resume)

    _run(work, as_json=as_json)


@app.command()
def results(
    output: Annotated[
        Path | None, typer.Option(help="The page to write; docs/results.md of the project where none is given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of results from the training runs in MLflow."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows import results as workflow

        return workflow.results(settings, output or workflow.PAGE)

    _run(work, as_json=as_json, show=_print_results)


def _print_results(found: dict[str, Any]) -> None:
    console = Console()
    table = Table("model", "recipe", "weights", "data", "runs", "test accuracy")
    for row in found["rows"]:
        accuracy = "" if row["test"] is None else f"{row['test']['accuracy']:.4f}"
        words = [row[key] for key in ("architecture", "recipe", "weights", "data")]
        table.add_row(*words, str(len(row["runs"])), accuracy)
    console.print(table)
    for target in found["targets"]:
        what = f"{target['architecture']} {target['recipe']}, test accuracy >= {target['bound']}"
        console.print(f"{what}: {target['verdict']}", markup=False, highlight=False)
    console.print(f"Written to {found['path']}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def pretrain(
    recipe: Annotated[
        Path, typer.Option(help="A recipe file of architecture vgg16_base.", exists=True, dir_okay=False)
    ] = PRETRAINING_RECIPE,
    *,
    output: Annotated[Path | None, typer.Option(help="Where the weights go; ends in .weights.h5.")] = None,
    dataset: DatasetId = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of a run cut off.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train VGG16's base from nothing, where ImageNet's weights cannot be had; VGG16_WEIGHTS takes the file."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.training_choice import newest, use_backend

        dataset_id = newest(settings, dataset)
        use_backend(settings.keras_backend)
        from ml.workflows.pretrain import pretrain as workflow

        return workflow(settings, dataset_id, recipe.absolute(), output.absolute() if output else None, resume=resume)

    _run(work, as_json=as_json)


@app.command()
def inspect(
    version: Annotated[int, typer.Argument(min=1, help="The number of a registered version.")],
    engine: Annotated[
        Engine | None, typer.Option(help="Which of its forms; the one in which it serves where none is given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a version, as the registry hands it out, loads, agrees with itself, and is quick and small enough.

    Ends with 0 where this could be found out, whatever was found.
    """

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.inspect_version import inspect_version as workflow

        return workflow(settings, version, engine.value if engine else None)

    _run(work, as_json=as_json, show=_print_inspection)


def _print_inspection(found: dict[str, Any]) -> None:
    _print_checks(found["checks"])
    failed = sum(not check["holds"] for check in found["checks"])
    says = f"{failed} of {len(found['checks'])} checks failed" if failed else "every check holds"
    Console().print(f"Version {found['version']}: {says} ({found['seconds']} s).", highlight=False)


def _print_checks(checks: list[dict[str, Any]]) -> None:
    table = Table("", "check", "found and wanted")
    for check in checks:
        verdict = "[green]holds[/]" if check["holds"] else "[bold red]FAILS[/]"
        table.add_row(verdict, check["name"], escape(check["says"]))
    Console().print(table)


@app.command()
def promote(
    *,
    dataset: DatasetId = None,
    test_limit: Annotated[int | None, typer.Option(min=1, help="Judge on so many test images instead of all.")] = None,
    new_lineage: Annotated[
        bool, typer.Option(help="Accept a champion's replacement by a model of another dataset.")
    ] = False,
    after_shadow: Annotated[
        int | None,
        typer.Option(min=1, help="Move the alias only after so many live images were mirrored to the winner."),
    ] = None,
    shadow_minutes: Annotated[float, typer.Option(min=0, help="For how long to wait for them at most.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Judge the candidates, alone and against the champion on the same images; move the alias where one is better."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.promote import promote as workflow

        return workflow(
            settings,
            dataset_id=dataset,
            test_limit=test_limit,
            new_lineage=new_lineage,
            after_shadow=after_shadow,
            shadow_wait_seconds=shadow_minutes * 60,
        )

    _run(work, as_json=as_json, show=_print_promotion)


def _print_promotion(result: dict[str, Any]) -> None:
    console = Console()
    console.print("[bold green]promoted[/]" if result["promoted"] else "[bold]nothing moved[/]")
    console.print(result["reason"], markup=False, highlight=False)
    pages = {candidate["version"]: candidate["report"] for candidate in result["candidates"]}
    for report in result["reports"]:
        version = report["candidate"]["version"]
        console.print(f"\nversion {version}: {report['outcome']}", markup=False)
        _print_checks(report["checks"])
        console.print(f"report: {pages[version]}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def rollback(as_json: AsJson = False) -> None:
    """Make the previous champion the champion again."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.rollback import rollback as workflow

        return workflow(settings)

    _run(work, as_json=as_json)


@app.command()
def engine(
    version: Annotated[int, typer.Argument(min=1, help="The number of a registered version.")],
    form: Annotated[Engine, typer.Argument(help="The form in which it is to serve.")],
    as_json: AsJson = False,
) -> None:
    """Have a version serve in float32, or in int8 where the gate's policy accepts it; the servers swap to it."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.engines import set_engine

        return set_engine(settings, version, form.value)

    _run(work, as_json=as_json)


@app.command()
def evaluate(
    version: Annotated[int | None, typer.Option(min=1, help="The version to measure, by its number.")] = None,
    alias: Annotated[
        Alias | None, typer.Option(help="The version to measure, by its alias; champion where none is given.")
    ] = None,
    *,
    full: Annotated[
        bool, typer.Option("--full", help="All test images in each corrupted cell; else as the gate's policy says.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure on at most so many test images.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Dataset id; the version's own where none is given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a version on its test split, clean and under the corruptions of CIFAR-10-C; judges nothing."""
    if version is not None and alias is not None:
        raise typer.BadParameter("give --version or --alias, not both.")

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.evaluate import evaluate as workflow

        role = (alias or Alias.champion).value
        return workflow(settings, version=version, alias=role, full=full, limit=limit, dataset_id=dataset)

    _run(work, as_json=as_json, show=_print_evaluation)


def _print_evaluation(found: dict[str, Any]) -> None:
    console = Console()
    who = f"version {found['version']} ({found['architecture']}) on {found['n']:,} test images of {found['dataset_id']}"
    console.print(f"{who}, {found['data']} data", markup=False, highlight=False)
    clean = Table("figure", "value", "95 % interval")
    for name, low, high in (
        ("accuracy", "accuracy_low", "accuracy_high"),
        ("calibration_error", "calibration_low", "calibration_high"),
        *((name, "", "") for name in ("loss", "precision", "recall", "f1")),
    ):
        interval = f"{found[low]:.4f} to {found[high]:.4f}" if low else ""
        clean.add_row(name.replace("_", " "), f"{found[name]:.4f}", interval)
    console.print(clean)
    corrupted = found["corrupted"]
    severities = list(next(iter(corrupted["cells"].values())))
    grid = Table("accuracy at severity", *severities, "mean")
    for name, accuracies in corrupted["cells"].items():
        cells = [f"{accuracies[severity]:.4f}" for severity in severities]
        grid.add_row(name.replace("_", " "), *cells, f"{corrupted['by_corruption'][name]:.4f}")
    console.print(grid)
    interval = f"{corrupted['mean_accuracy_low']:.4f} to {corrupted['mean_accuracy_high']:.4f}"
    mean = f"Mean accuracy under corruption {corrupted['mean_accuracy']:.4f} (95 % interval {interval})"
    cost = f"{corrupted['n']:,} images a cell; {found['seconds']:.0f} s"
    console.print(f"{mean}, {cost}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def challenge(
    version: Annotated[
        int | None, typer.Argument(help="Which one; the present challenger where none is given.")
    ] = None,
    *,
    mirror: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Show it this share of the requests; the champion answers.")
    ] = None,
    canary: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Let it answer this share of the requests.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Send it no traffic any more.")] = False,
    unjudged: Annotated[
        bool, typer.Option("--unjudged", help="Let it answer though the gate has not judged it yet.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send a share of the traffic to a challenger, or mirror it; without arguments say what is set."""

    def work(settings: Settings) -> dict[str, Any]:
        if (mirror is not None) + (canary is not None) + off > 1 or (off and version is not None):
            raise ConfigurationError(
                "--mirror, --canary and --off exclude each other, and --off takes no version.",
                fix="say one of them.",
            )
        from ml.workflows import challenge as workflow

        if off:
            return workflow.end_challenge(settings)
        mode: Mode | None = "mirror" if mirror is not None else "canary" if canary is not None else None
        share = mirror if mirror is not None else canary
        return workflow.challenge(settings, version, mode=mode, share=share, unjudged=unjudged)

    _run(work, as_json=as_json)


@app.command()
def monitor(
    min_predictions: Annotated[
        int | None, typer.Option(min=2, help="Fewer predictions than this are `insufficient`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the live predictions with the champion's reference; alert and ask for a retraining on drift."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.monitor import monitor as workflow

        return workflow(settings, min_predictions=min_predictions)

    _run(work, as_json=as_json)


@app.command()
def predict(
    files: Annotated[
        list[str], typer.Argument(help="PNG, JPEG and WebP files, folders of such, or - for one image on stdin.")
    ],
    *,
    output: Annotated[
        Format | None, typer.Option("--format", help="How to print them; table where none is given.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The prediction server; PREDICTIONS_URL where none is given.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file that holds the key; else the first of PREDICTION_API_KEYS.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="For how many seconds to ask again a server that is away or busy.")
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Ask the prediction server what images show. An image that it refuses stops no other; the exit code is then 1."""
    if as_json and output not in (None, Format.json):
        raise typer.BadParameter(f"--json and --format {output} exclude each other.")
    from ml.workflows import predict as workflow

    found = _run(
        lambda settings: workflow.predict(settings, files, url=url, key_file=api_key_file, patience=patience),
        as_json=as_json or output is Format.json,
        show=workflow.print_csv if output is Format.csv else workflow.print_table,
    )
    if found["failed"]:
        raise typer.Exit(1)


@app.command()
def retain(as_json: AsJson = False) -> None:
    """Remove days of predictions that are older than PREDICTION_RETENTION_DAYS; the monitor does it by itself."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.workflows.retain import retain as workflow

        return workflow(settings)

    _run(work, as_json=as_json)


@app.command()
def migrate(as_json: AsJson = False) -> None:
    """Bring the predictions database (MLOPS_DATABASE_URL) to the newest schema; `up` does it for the local stack."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.stack.migrations import migrate as workflow

        return workflow(settings.database_url)

    _run(work, as_json=as_json)


keys = typer.Typer(help="Make, list and revoke keys of the prediction server's callers.", no_args_is_help=True)
app.add_typer(keys, name="keys")
KeyName = Annotated[str, typer.Argument(help="Of whoever holds the key: letters, digits and . _ -")]


def _key_file(settings: Settings) -> Path:
    if settings.prediction_api_keys_file is None:
        raise ConfigurationError(
            "There is no file of API keys: PREDICTION_API_KEYS_FILE is not set.",
            fix="set it to a path that the prediction server reads too, in the environment or in .env.",
        )
    return settings.prediction_api_keys_file


@keys.command("add")
def add_key(
    name: KeyName,
    limit: Annotated[
        float | None, typer.Option(help="Images per second; PREDICTION_RATE_LIMIT where none is given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once, and only its hash is kept; a running server takes it within a second."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.serving import api_keys

        key, record = api_keys.add_key(_key_file(settings), name, limit)
        return {"key": key, **record.model_dump(mode="json")}

    _run(work, as_json=as_json)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys by name."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.serving import api_keys

        return {"keys": [key.model_dump(mode="json") for key in api_keys.read_keys(_key_file(settings))]}

    def show(found: dict[str, Any]) -> None:
        table = Table("name", "created", "images/s", "SHA-256")
        for key in found["keys"]:
            table.add_row(key["name"], key["created"], f"{key['limit'] or ''}", f"{key['sha256'][:12]}...")
        Console().print(table)

    _run(work, as_json=as_json, show=show)


@keys.command("revoke")
def revoke_key(name: KeyName, as_json: AsJson = False) -> None:
    """Take a key out; a running server refuses it within a second."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.serving import api_keys

        return {"revoked": api_keys.revoke_key(_key_file(settings), name).name}

    _run(work, as_json=as_json)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Say what of the local stack runs, and where."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.stack.local import status as workflow

        return workflow(settings)

    _run(work, as_json=as_json, show=_print_status)


def _print_status(found: dict[str, Any]) -> None:
    console = Console()
    console.print(f"The stack is [bold]{found['state']}[/]{': ' + found['detail'] if found['detail'] else '.'}")
    if found["units"]:
        table = Table("unit", "state", "pid", "restarts", "")
        for unit in found["units"].values():
            table.add_row(unit["name"], unit["state"], str(unit["pid"] or ""), str(unit["restarts"]), unit["detail"])
        console.print(table)
    for name, url in found["urls"].items():
        console.print(f"  {name:12} {url}")


@app.command()
def up(
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when all is ready; `cifar10 down` stops it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start the local stack: PostgreSQL, MLflow, Airflow, the prediction server, the reports."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.stack import local
        from ml.stack.components import urls

        if detach:
            local.start_in_background(settings)
            return {"state": "running", "urls": urls(settings)}
        local.up(settings, on_ready=lambda: _announce(settings))
        return {"state": "stopped", "urls": {}}

    _run(work, as_json=as_json)


def _announce(settings: Settings) -> None:
    from ml.stack.components import urls

    console = Console(stderr=True)
    console.print("\n[bold green]The stack is ready.[/] Ctrl-C stops all of it.")
    for name, url in urls(settings).items():
        console.print(f"  {name:12} {url}")
    # Not the password itself: in the background this goes into a log.
    secrets_file = settings.mlops_var_dir / "secrets.json"
    console.print(f"  Airflow's user is admin; the password is airflow_admin in {secrets_file}\n", soft_wrap=True)


@app.command()
def down(as_json: AsJson = False) -> None:
    """Stop the local stack, and whatever a killed one left behind."""

    def work(settings: Settings) -> dict[str, Any]:
        from ml.stack.local import down as workflow

        return workflow(settings)

    _run(work, as_json=as_json)


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Start the stack and run the whole loop once: ingest, train, promote, serve, drift, retrain."""

    from ml.demo import loop, report

    _run(loop.demo, as_json=as_json, show=report.print_table)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
