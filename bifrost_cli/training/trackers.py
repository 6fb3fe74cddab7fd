"""TensorBoard, wandb, trackio and mlflow beside the CSV tables, through `accelerate.tracking`.

The tables stay the truth: a tracker that fails during a training is named once and left out, and the training goes on.
Nothing is sent anywhere unless the user's own settings say so: wandb runs offline unless WANDB_MODE is set, trackio and
mlflow keep local files unless their environment variables name a server.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bifrost_cli.errors import EnvironmentProblem

PROJECT = "bifrost"
_PACKAGES = {"tensorboard": "'bifrost-cli[tensorboard]'"}  # what pip installs; else the tracker's own name


def _options(name: str, folder: Path) -> dict[str, Any]:
    """Arguments of accelerate's tracker for a training that writes to `folder`, RUN/work."""
    run = folder.absolute().parent.name
    if name == "tensorboard":
        return {"run_name": name, "logging_dir": folder}
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        return {"run_name": PROJECT, "name": run, "id": run, "resume": "allow", "dir": str(folder), "mode": mode}
    if name == "trackio":
        return {"run_name": PROJECT, "name": run, "resume": "allow"}
    os.environ.setdefault("MLFLOW_TRACKING_URI", (folder / "mlruns").absolute().as_uri())
    return {"experiment_name": PROJECT, "run_name": run}


class Trackers:
    """The trackers of `train.report_to`, started."""

    def __init__(self, names: Sequence[str], folder: Path, config: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Start them.

        Args:
            names: of `accelerate.tracking`.
            folder: where those that keep local files keep them.
            config: settings of the training, which the trackers show beside its curves.
            warn: is called with a sentence for each tracker that fails later.

        Raises:
            EnvironmentProblem: a package is not installed (BF-ENV-002), or its tracker does not start (BF-ENV-004).
        """
        self._warn = warn
        self._trackers = {name: _start(name, folder, config) for name in names}

    def log(self, group: str, step: int, row: dict[str, float]) -> None:
        """Numbers of one step, as `group/name`."""
        values = {f"{group}/{name}": float(value) for name, value in row.items()}
        self._each(lambda tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        """Close them."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, work: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                work(tracker)
            except Exception as error:  # a server that is down, a full disk: none of it may stop a training
                del self._trackers[name]
                self._warn(f"warning: {name} is left out from here: {type(error).__name__}: {error}")


def _start(name: str, folder: Path, config: dict[str, Any]) -> Any:
    try:
        importlib.import_module(name)
    except ImportError:
        raise EnvironmentProblem(
            f"train.report_to names {name}, which is not installed",
            fix=f"pip install {_PACKAGES.get(name, name)}, or leave it out of train.report_to",
            code="BF-ENV-002",
        ) from None
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    try:
        PartialState()  # its trackers' log lines want it; process groups that exist are taken as they are
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(**_options(name, folder))
        tracker.main_process_only = False  # only the first process has one
        getattr(tracker, "start", lambda: None)()  # older releases start when they are made
        if name != "tensorboard":  # there it is a run of its own for each start
            tracker.store_init_configuration(config)
        return tracker
    except Exception as error:
        raise EnvironmentProblem(
            f"{name} does not start: {type(error).__name__}: {error}",
            fix="set it up, or leave it out of train.report_to",
            code="BF-ENV-004",
        ) from error
