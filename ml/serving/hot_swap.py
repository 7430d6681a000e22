"""Follows the champion: looks who it is, loads it beside the one that serves, swaps between two requests.

Owns the model that answers, and the promise that a model is never replaced by one that does not work. While traffic is
meant for the challenger, it is loaded beside; nothing that happens to it touches the champion. Where models come from
is behind `ChampionSource`; which of the two gets a request is `ml.serving.router`'s; HTTP and metrics read `current()`
and `state()`.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from ml.errors import CifarError, ModelInvalid, ModelNotFound, RegistryUnavailable, ServiceUnavailable, StorageError
from ml.files import write_whole
from ml.serving.engine import Predictor, ServingEngine
from ml.traffic import Traffic

logger = logging.getLogger(__name__)

ALIAS, CHALLENGER_ALIAS = "champion", "challenger"


@dataclass(frozen=True)
class Champion:
    """Who bears the alias, or may come to: a challenger is described alike.

    `data` is "cifar-10" or "SYNTHETIC"; `weights` says what training started from. `fingerprint` tells the model's
    content: a registry that was made anew counts its versions from 1 again.
    """

    name: str
    version: int
    data: str
    architecture: str = ""
    weights: str = ""
    fingerprint: str = ""
    engine: Literal["fp32", "int8"] = "fp32"
    """The form in which it serves; `fingerprint` is that form's, so that another form is another model."""

    @property
    def identity(self) -> tuple[str, int, str]:
        """Two champions of one identity are the same model."""
        return (self.name, self.version, self.fingerprint)


class ChampionSource(Protocol):
    """A registry, as far as serving needs one. One thread asks."""

    def champion(self) -> Champion | None:
        """Who it is; None where the registry says that there is none. RegistryUnavailable where it cannot be asked."""

    def challenger(self) -> tuple[Champion, Traffic] | None:
        """Who the challenger is, and the traffic that is set; None where there is either no challenger or no traffic.

        Asked after `champion`: what the registry answered then may be used again. Whether the traffic is meant for
        this challenger is left to the caller. RegistryUnavailable where it cannot be asked, RegistryError where what is
        set cannot be read.
        """

    def fetch(self, champion: Champion) -> Path:
        """Path of its ONNX file on this machine. RegistryUnavailable, RegistryError or StorageError where it fails."""


@dataclass(frozen=True)
class LoadedModel:
    """A champion that is ready to predict, and since when."""

    engine: Predictor
    name: str
    version: int
    alias: str
    data: str
    architecture: str
    weights: str
    loaded_at: datetime
    engine_name: Literal["fp32", "int8"] = "fp32"
    """The form that is loaded."""


@dataclass(frozen=True)
class Failure:
    """The latest thing that went wrong and has not been mended since. `version` None: the question itself failed.

    `message` is for clients: it names no address and no path; those are in the log.
    """

    at: datetime
    version: int | None
    message: str


@dataclass(frozen=True)
class Challenger:
    """The challenger while traffic is meant for it.

    `model` None: it gets nothing, since it is being loaded, or could not be, which `failure` then says. `traffic` None:
    what it is to get cannot be read. A failure beside a model: the registry could not be asked since, and it goes on.
    """

    traffic: Traffic | None
    model: LoadedModel | None
    failure: Failure | None


@dataclass(frozen=True)
class FollowerState:
    """What the follower has done so far; `swaps` counts the first load too.

    `challenger` None: no traffic is meant for one. `failed_challengers` counts its loads that failed.
    """

    model: LoadedModel | None
    failure: Failure | None
    swaps: int
    failed_swaps: int
    challenger: Challenger | None = None
    failed_challengers: int = 0


class ChampionFollower:
    """Keeps the champion loaded, and beside it the challenger while traffic is meant for it.

    A version that cannot be used is tried again after `again_after` seconds, so that a broken one is not downloaded at
    every poll. Whatever fails, the model that serves goes on. Where the registry is away at the start, the champion
    that this machine served last is loaded from `cache_dir`; where it answers that there is none, nothing is.

    Args:
        source: whom to ask.
        cache_dir: a folder of the server's own; remembers the last good champion.
        every: seconds between two looks.
        again_after: seconds before a version that failed is tried again.
        load: makes a predictor of an ONNX file; raises ModelInvalid where it is not one.
    """

    def __init__(
        self,
        source: ChampionSource,
        cache_dir: Path,
        *,
        every: float = 2.0,
        again_after: float = 60.0,
        load: Callable[[Path], Predictor] = ServingEngine,
    ) -> None:
        self._source = source
        self._memory = cache_dir / "serving" / "last_champion.json"
        self._every = every
        self._champions = _Loader(source, load, again_after)
        # A change of champion waits while a challenger is fetched: one whose files do not come is not asked for at
        # every look.
        self._challengers = _Loader(source, load, again_after, spare=True)
        self._load = load
        self._ending = threading.Event()
        self._looked = threading.Event()
        self._thread: threading.Thread | None = None
        # One reference, replaced whole: readers need no lock, and a request keeps the model that it began with.
        self._state = FollowerState(model=None, failure=None, swaps=0, failed_swaps=0)
        self._recalled = False
        self._serving: Champion | None = None
        self._crowned: int | None = None  # who bears the alias, whether or not it could be loaded
        self._challenging: Champion | None = None
        self._refusal: Failure | None = None  # of the challenger that could not be loaded last
        self._told: tuple[int | None, str] | None = None  # of the challenger, so that it is told once

    def current(self) -> LoadedModel:
        """The model that answers now. Take it once per request, so that the reply's version is the one that predicted.

        Raises:
            ServiceUnavailable: when none is loaded.
        """
        state = self._state
        if state.model is not None:
            return state.model
        if state.failure is None:
            raise ServiceUnavailable("The model is being loaded.", fix="try again in a few seconds.")
        raise ServiceUnavailable(
            f"No model is loaded. {state.failure.message}",
            fix="train and promote one (`cifar10 promote`), or see the server's log; it looks again every few seconds.",
        )

    def state(self) -> FollowerState:
        """What has happened so far."""
        return self._state

    def start(self, patience: float = 0.0) -> None:
        """Starts to follow in a background thread. `current` raises until a model is loaded.

        Args:
            patience: seconds that it waits for the first look to be over.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="champion-follower", daemon=True)
            self._thread.start()
        self._looked.wait(patience)

    def close(self) -> None:
        """Stops following; the loaded model goes on answering."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(1)

    def poll(self) -> None:
        """Looks once and swaps where the champion is another one. Called by the thread; a test may call it itself.

        What fails is told by `state`; who serves goes on. The champion comes first: it waits for no challenger that
        this look would load. Where the registry cannot be asked for it, the challenger stays as it is.
        """
        if self._follow_champion():
            self._follow_challenger()

    def _follow_champion(self) -> bool:
        """One look; False where the registry did not answer."""
        try:
            champion = self._source.champion()
        except (CifarError, OSError) as error:
            self._fail(error)
            unasked = isinstance(error, RegistryUnavailable)
            if unasked and not self._recalled and self._state.model is None:
                self._recalled = True
                self._recall()
            return False
        self._crowned = None if champion is None else champion.version
        if champion is None:
            self._nobody()
        elif self._is_serving(champion):
            if self._state.failure is not None:
                logger.info("%s version %d is the champion and serves.", champion.name, champion.version)
                self._state = replace(self._state, failure=None)
        elif not self._champions.was_refused(champion):
            self._swap_to(champion)
        return True

    def _follow_challenger(self) -> None:
        try:
            found = self._source.challenger()
        except ServiceUnavailable as error:
            # Nothing was said of the traffic: it goes on as it was last known.
            self._challenger_fails(error, self._state.challenger or Challenger(None, None, None))
            return
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the challenger, the champion is followed
            # Traffic by an order that cannot be read would be a guess.
            self._drop_challenger()
            self._challenger_fails(error, Challenger(None, None, None), "The challenger's traffic cannot be read.")
            return
        if found is None or not self._is_meant_for(*found):
            self._drop_challenger()
            self._set_challenger(None)
        else:
            self._challenge(*found)

    def _is_meant_for(self, challenger: Champion, traffic: Traffic) -> bool:
        # The champion by its alias and the one that serves may differ, where the first cannot be loaded.
        serves = self._serving is not None and self._serving.version == challenger.version
        return traffic.is_for(challenger.version, self._crowned) and not serves

    def _challenge(self, challenger: Champion, traffic: Traffic) -> None:
        held = self._state.challenger
        same = self._challenging is not None and self._challenging.identity == challenger.identity
        if same and held is not None:
            if held.traffic != traffic or held.failure is not None:
                self._set_challenger(Challenger(traffic, held.model, None))
                _tell(traffic)
        elif self._challengers.was_refused(challenger):
            self._drop_challenger()
            self._set_challenger(Challenger(traffic, None, self._refusal))
        else:
            self._drop_challenger()
            self._load_challenger(challenger, traffic)

    def _load_challenger(self, challenger: Champion, traffic: Traffic) -> None:
        self._set_challenger(Challenger(traffic, None, None))
        try:
            _, engine = self._challengers.load(challenger)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the challenger, the champion is followed
            self._state = replace(self._state, failed_challengers=self._state.failed_challengers + 1)
            self._refusal = self._challenger_fails(error, Challenger(traffic, None, None), version=challenger.version)
            return
        self._challenging, self._told = challenger, None
        self._set_challenger(Challenger(traffic, _loaded(challenger, engine, CHALLENGER_ALIAS), None))
        _tell(traffic)

    def _drop_challenger(self) -> None:
        """Forgets who it was; what the state says of it is set apart, in one step."""
        if self._challenging is not None:
            logger.info("Version %d gets no traffic as the challenger any more.", self._challenging.version)
        self._challenging = None

    def _set_challenger(self, challenger: Challenger | None) -> None:
        self._state = replace(self._state, challenger=challenger)

    def _challenger_fails(
        self, error: Exception, standing: Challenger, said: str | None = None, version: int | None = None
    ) -> Failure:
        failure = Failure(datetime.now(UTC), version, said or _for_clients(error))
        self._set_challenger(replace(standing, failure=failure))
        if self._told != (version, str(error)):
            expected = isinstance(error, (CifarError, OSError))
            logger.warning("Challenger: %s", error, exc_info=None if expected else error)
        self._told = (version, str(error))
        return failure

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self.poll()
            except Exception as error:  # noqa: BLE001 - a thread that dies unseen would never see a champion again
                self._fail(error)
            self._looked.set()
            self._ending.wait(self._every)

    def _is_serving(self, champion: Champion) -> bool:
        return self._serving is not None and self._serving.identity == champion.identity

    def _nobody(self) -> None:
        serving = self._state.model
        self._fail(
            ModelNotFound(
                f"The registry has no version with the alias {ALIAS!r}"
                + (f"; version {serving.version} goes on serving." if serving else "."),
                fix="train and promote one: `cifar10 train baseline`, then `cifar10 promote`.",
            )
        )

    def _swap_to(self, champion: Champion) -> None:
        try:
            path, engine = self._champions.load(champion)
        except (CifarError, OSError) as error:
            self._fail(error, champion.version)
            return
        self._take(champion, engine)
        self._remember(champion, path)

    def _take(self, champion: Champion, engine: Predictor) -> None:
        before, model = self._state.model, _loaded(champion, engine, ALIAS)
        if self._challenging is not None and self._challenging.identity == champion.identity:
            self._drop_challenger()  # it has become the champion
            self._set_challenger(None)
        self._serving = champion
        self._state = replace(self._state, model=model, failure=None, swaps=self._state.swaps + 1)
        instead = f", instead of version {before.version}" if before else ""
        logger.info("%s version %d (%s) serves now%s.", model.name, model.version, model.data, instead)

    def _fail(self, error: Exception, version: int | None = None) -> None:
        failure = Failure(datetime.now(UTC), version, _for_clients(error))
        last = self._state.failure
        if last is None or (last.version, last.message) != (failure.version, failure.message):
            expected = isinstance(error, (CifarError, OSError))
            logger.warning("Champion: %s", error, exc_info=None if expected else error)
        failed_swaps = self._state.failed_swaps + (version is not None)
        self._state = replace(self._state, failure=failure, failed_swaps=failed_swaps)

    def _remember(self, champion: Champion, path: Path) -> None:
        try:
            write_whole(self._memory, json.dumps({**asdict(champion), "path": str(path)}))
        except OSError as error:
            logger.warning("The champion cannot be remembered for a start without a registry: %s", error)

    def _recall(self) -> None:
        """Loads the champion that this machine served last; leaves the failure standing, since it may be outdated."""
        failure = self._state.failure
        try:
            stored = json.loads(self._memory.read_text())
            path = Path(stored.pop("path"))
            champion = Champion(**stored)
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("The last champion's record in %s cannot be used: %s", self._memory, error)
            return
        try:
            engine = self._load(path)
        except (ModelInvalid, OSError) as error:
            logger.warning("The last champion cannot be used: %s", error)
            return
        logger.warning("The registry is away: the last champion is taken from the cache.")
        self._take(champion, engine)
        self._state = replace(self._state, failure=failure)


class _Loader:
    """Fetches and loads versions, and remembers the one that failed last, so that it is not tried at every look.

    `spare`: so too where the registry could not be asked; else it may be back at the next look.
    """

    def __init__(
        self, source: ChampionSource, load: Callable[[Path], Predictor], again_after: float, *, spare: bool = False
    ) -> None:
        self._spare = spare
        self._source = source
        self._load = load
        self._again_after = again_after
        self._refused: tuple[Champion, float] | None = None

    def was_refused(self, version: Champion) -> bool:
        """Whether it failed less than `again_after` seconds ago."""
        return (
            self._refused is not None
            and self._refused[0].identity == version.identity
            and time.monotonic() - self._refused[1] < self._again_after
        )

    def load(self, version: Champion) -> tuple[Path, Predictor]:
        """Its ONNX file and what predicts with it. Raises whatever fetching and loading raise."""
        try:
            path = self._source.fetch(version)
            engine = self._load(path)
        except Exception as error:
            if self._spare or not isinstance(error, ServiceUnavailable):
                self._refused = (version, time.monotonic())
            raise
        self._refused = None
        return path, engine


def _loaded(version: Champion, engine: Predictor, alias: str) -> LoadedModel:
    return LoadedModel(
        engine=engine,
        name=version.name,
        version=version.version,
        alias=alias,
        data=version.data,
        architecture=version.architecture,
        weights=version.weights,
        loaded_at=datetime.now(UTC),
        engine_name=version.engine,
    )


def _tell(traffic: Traffic) -> None:
    does = "answers" if traffic.mode == "canary" else "is shown"
    logger.info("Version %d %s %g of the requests as the challenger.", traffic.version, does, traffic.share)


def _for_clients(error: Exception) -> str:
    if isinstance(error, (ModelInvalid, ModelNotFound)):
        return error.message  # speaks of versions and of file names alone
    if isinstance(error, RegistryUnavailable):
        return "The model registry could not be asked."
    if isinstance(error, (StorageError, OSError)):
        return "The model's files could not be kept on the server's disk."
    if isinstance(error, CifarError):
        return "The model registry refused to hand out the model."
    return "The server could not look for its model; its log says why."
