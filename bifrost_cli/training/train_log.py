"""What a training writes down: the tables losses.csv and validation.csv, the lines of train.log, and trackers. The
tables are the same bytes however often the training was interrupted, so they hold no times; those go to train.log. A
tracker that fails during a training is named once and left out. Nothing is sent anywhere unless the user's own settings
say so."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts.files import append, remove, sha256_file, sync, write_bytes
from bifrost_cli.config.schema import Train
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.runtime.ui import Ui

SOON = 20.0  # seconds; unless told to ask earlier, SLURM kills 30 s after it asked for a stop
PROJECT = "bifrost"
_ROW = re.compile(r"(step|\d+)(,[^,\0]+)+\n")


class TrainingLogger(AbstractContextManager["TrainingLogger"]):
    """All that a training writes down, in `folder`. Lines in train.log are what the user is told."""

    def __init__(self, folder: Path, train: Train, ui: Ui | None) -> None:
        self._losses, self._validation = Table(folder / "losses.csv"), Table(folder / "validation.csv")
        self._train, self._say = train, ui.say if ui is not None else lambda line: None
        self._path, self._warned, self._data_wait = folder / "train.log", False, 0.0
        append(self._path, "")  # there from the start, for who follows it
        self._trackers = {name: _start_tracker(name, folder, vars(train)) for name in train.report_to}

    def __exit__(self, *exc: object) -> None:
        self._track(lambda tracker: tracker.finish())

    def cut(self, step: int, digests: dict[str, str | None]) -> None:
        """Leave what belongs to the steps up to `step`. ArtifactError when losses are missing, or another than then."""
        self._losses.cut(step, digests.get("losses"), complete=True)
        self._validation.cut(step, digests.get("validation"), complete=False)

    def begin(self, step: int, seconds: float) -> None:
        """Start the clock at `step`, `seconds` into the training."""
        self._first, self._before = step, seconds
        self._began = self._spoken = time.monotonic()
        if step:
            self.tell(f"continues at step {step} of {self._train.steps}")

    def seconds(self) -> float:
        """Seconds of the whole training so far, those before a resume included."""
        return self._before + time.monotonic() - self._began

    def step(self, step: int, row: dict[str, float], data_wait: float = 0.0) -> None:
        """A row, and every `log_every` steps a line, but at most one in 5 s and at least one in 30 s. `data_wait`:
        seconds that steps have waited for their rows since `begin`."""
        self._losses.add(step, row)
        self._data_wait = data_wait
        train, now = self._train, time.monotonic()
        interval = bool(train.log_every) and step % train.log_every == 0
        if interval:
            self._track_row("train", step, row)
        waited = now - self._spoken
        if waited < 30 and step != train.steps and not (interval and waited >= 5):
            return
        self._spoken = now
        each = (now - self._began) / (step - self._first)
        speed = train.batch_size * train.accumulate / each
        minutes, seconds = divmod(int((train.steps - step) * each), 60)
        left = f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
        rate = f"lr {row['lr']:.2e}  {speed:.1f} samples/s  data_wait {data_wait / (now - self._began):.1%}"
        self.tell(f"step {step}/{train.steps}  loss {row['loss']:.4f}  {rate}  {left} left")

    def end(self) -> None:
        """Say how much of the time since `begin` went into waiting for rows: a slow disk is seen here."""
        passed = time.monotonic() - self._began
        self.tell(f"data_wait {self._data_wait:.2f} s of {passed:.1f} s ({self._data_wait / passed:.1%})")

    def validation(self, step: int, row: dict[str, float]) -> None:
        self._validation.add(step, row)
        self.tell(f"step {step}/{self._train.steps}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
        self._track_row("validation", step, row)

    def sync(self) -> dict[str, str | None]:
        """Make the tables durable; their digests are for the checkpoint that counts on them."""
        return {"losses": self._losses.sync(), "validation": self._validation.sync()}

    def saved(self, seconds: float) -> None:
        """Say, once, that whoever stops the job must leave it the time that a checkpoint takes."""
        if seconds > SOON and not self._warned:
            self._warned = True
            asked = max(300, 60 * math.ceil(2 * seconds / 60))  # twice a save, in whole minutes, five at least
            self.tell(
                f"warning: a checkpoint takes {seconds:.0f} s; a job that is killed sooner than that after "
                f"SIGTERM goes on from the one before (SLURM: --signal=TERM@{asked})"
            )

    def tell(self, line: str) -> None:
        """Say a line, and write it into train.log with the time."""
        self._say(line)
        append(self._path, f"{time.strftime('%Y-%m-%dT%H:%M:%S')}  {self.seconds():.1f} s  {line}\n")

    def _track_row(self, group: str, step: int, row: dict[str, float]) -> None:
        values = {f"{group}/{name}": float(value) for name, value in row.items()}
        self._track(lambda tracker: tracker.log(values, step=step))

    def _track(self, work: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                work(tracker)
            except Exception as error:  # a server that is down, a full disk: none of it may stop a training
                del self._trackers[name]
                self.tell(f"warning: {name} is left out from here: {type(error).__name__}: {error}")


class Table:
    """A CSV whose first column is `step`; the other columns are those of the first row written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []

    def cut(self, step: int, digest: str | None, *, complete: bool) -> None:
        """Keep the rows up to `step`. ArtifactError: `complete` and not all of 1..step are there; not what `sync` gave
        the `digest` of (None: not known)."""
        lines = self.path.read_bytes().decode(errors="replace").splitlines(keepends=True) if self.path.exists() else []
        whole = list(itertools.takewhile(_ROW.fullmatch, lines))  # after a power cut the rest can be anything
        kept = whole[:1] + [line for line in whole[1:] if int(line.split(",")[0]) <= step]
        if complete and len(kept) != step + 1 and step > 0:
            raise ArtifactError(f"{self.path} does not reach the checkpoint it belongs to (step {step})",
                                at=f"{max(0, len(kept) - 1)} rows", fix="remove the folder and train again",
                                code="BF-ART-005")  # fmt: skip
        data = "".join(kept).encode()
        if digest not in (None, hashlib.sha256(data).hexdigest()):
            raise ArtifactError(f"{self.path} was changed since step {step} was saved", code="BF-ART-005",
                                fix="restore it from a copy, or remove the folder and train again")  # fmt: skip
        if step == 0 or not kept:
            remove(self.path)
        else:
            write_bytes(self.path, data)
            self._columns = kept[0].strip().split(",")[1:]

    def add(self, step: int, row: dict[str, float]) -> None:
        """Append one row; numbers are written with 9 digits, enough for every float32."""
        lines = [] if self._columns else [",".join(["step", *row])]
        self._columns = self._columns or list(row)
        lines.append(",".join([str(step), *(f"{row[name]:.9g}" for name in self._columns)]))
        append(self.path, "\n".join(lines) + "\n")

    def sync(self) -> str | None:
        """Make what was added durable, before the checkpoint that counts on it; the file's sha256 (None: no file)."""
        if not self.path.exists():
            return None
        sync(self.path)
        sync(self.path.parent)
        return sha256_file(self.path)


def _start_tracker(name: str, folder: Path, config: dict[str, Any]) -> Any:
    """Of `accelerate.tracking`, with the training's settings beside its curves."""
    try:
        importlib.import_module(name)
    except ImportError:
        package = "'bifrost-cli[tensorboard]'" if name == "tensorboard" else name
        raise EnvironmentProblem(f"train.report_to names {name}, which is not installed",
                                 fix=f"pip install {package}, or leave it out of train.report_to",
                                 code="BF-ENV-002") from None  # fmt: skip
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
        raise EnvironmentProblem(f"{name} does not start: {type(error).__name__}: {error}",
                                 fix="set it up, or leave it out of train.report_to",
                                 code="BF-ENV-004") from error  # fmt: skip


def _options(name: str, folder: Path) -> dict[str, Any]:
    """Arguments of a tracker for a training that writes to `folder`, RUN/work: wandb runs offline unless WANDB_MODE is
    set, trackio and mlflow keep local files unless their environment variables name a server."""
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
