"""What a training writes down: the tables losses.csv and validation.csv, and the lines of train.log.

The tables are the same bytes however often the training was interrupted (on resume they are cut back to the step of the
checkpoint), so they hold no times; those go to train.log.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import time
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts.files import append, remove, sha256_file, sync, write_bytes
from bifrost_cli.config.schema import Train
from bifrost_cli.errors import ArtifactError
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.trackers import Trackers

SOON = 20.0  # seconds; unless told to ask earlier, SLURM kills 30 s after it asked for a stop
_ROW = re.compile(r"(step|\d+)(,[^,\0]+)+\n")


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
            raise ArtifactError(
                f"{self.path} does not reach the checkpoint it belongs to (step {step})",
                at=f"{max(0, len(kept) - 1)} rows",
                fix="remove the folder and train again",
                code="BF-ART-005",
            )
        data = "".join(kept).encode()
        if digest not in (None, hashlib.sha256(data).hexdigest()):
            raise ArtifactError(
                f"{self.path} was changed since step {step} was saved",
                code="BF-ART-005",
                fix="restore it from a copy, or remove the folder and train again",
            )
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


class Journal:
    """Speed and times of a training: a line to the user every `log_every` steps (at most one in 5 s, at least one
    in 30 s), the same lines in train.log, and the trackers of `train.report_to`. Context manager."""

    def __init__(self, folder: Path, train: Train, ui: Ui | None) -> None:
        self._train, self._say = train, ui.say if ui is not None else lambda line: None
        self._path = folder / "train.log"
        append(self._path, "")  # there from the start, for who follows it
        self._trackers = Trackers(train.report_to, folder, vars(train), lambda line: self._tell(line))
        self._warned = False

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._trackers.finish()

    def begin(self, step: int, seconds: float) -> None:
        """Start the clock at `step`, `seconds` into the training."""
        self._first, self._before = step, seconds
        self._began = self._spoken = time.monotonic()
        if step:
            self._tell(f"continues at step {step} of {self._train.steps}")

    def seconds(self) -> float:
        """Seconds of the whole training so far, those before a resume included."""
        return self._before + time.monotonic() - self._began

    def step(self, step: int, row: dict[str, float]) -> None:
        """One line when it is time: step, loss, learning rate, samples per second, time left."""
        train, now = self._train, time.monotonic()
        interval = bool(train.log_every) and step % train.log_every == 0
        if interval:
            self._trackers.log("train", step, row)
        waited = now - self._spoken
        if waited < 30 and step != train.steps and not (interval and waited >= 5):
            return
        self._spoken = now
        each = (now - self._began) / (step - self._first)
        speed = train.batch_size * train.accumulate / each
        self._tell(
            f"step {step}/{train.steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  {speed:.1f} samples/s  "
            f"{_clock((train.steps - step) * each)} left"
        )

    def validation(self, step: int, row: dict[str, float]) -> None:
        self._tell(f"step {step}/{self._train.steps}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
        self._trackers.log("validation", step, row)

    def saved(self, seconds: float) -> None:
        """Say, once, that whoever stops the job must leave it the time that a checkpoint takes."""
        if seconds > SOON and not self._warned:
            self._warned = True
            self._tell(
                f"warning: a checkpoint takes {seconds:.0f} s; a job that is killed sooner than that after "
                f"SIGTERM goes on from the one before (SLURM: --signal=TERM@{_asked(seconds)})"
            )

    def _tell(self, line: str) -> None:
        self._say(line)
        append(self._path, f"{time.strftime('%Y-%m-%dT%H:%M:%S')}  {self.seconds():.1f} s  {line}\n")


class TrainingLogger:
    """All that a training writes down, in `folder`. Context manager."""

    def __init__(self, folder: Path, train: Train, ui: Ui | None) -> None:
        self._losses, self._validation = Table(folder / "losses.csv"), Table(folder / "validation.csv")
        self._journal = Journal(folder, train, ui)
        self.begin, self.seconds, self.saved = self._journal.begin, self._journal.seconds, self._journal.saved

    def __enter__(self) -> TrainingLogger:
        return self

    def __exit__(self, *exc: object) -> None:
        self._journal.__exit__(*exc)

    def cut(self, step: int, digests: dict[str, str | None]) -> None:
        """Leave what belongs to the steps up to `step`. ArtifactError when losses are missing, or another than then."""
        self._losses.cut(step, digests.get("losses"), complete=True)
        self._validation.cut(step, digests.get("validation"), complete=False)

    def step(self, step: int, row: dict[str, float]) -> None:
        self._losses.add(step, row)
        self._journal.step(step, row)

    def validation(self, step: int, row: dict[str, float]) -> None:
        self._validation.add(step, row)
        self._journal.validation(step, row)

    def sync(self) -> dict[str, str | None]:
        """Make the tables durable; their digests are for the checkpoint that counts on them."""
        return {"losses": self._losses.sync(), "validation": self._validation.sync()}


class NullLogger(TrainingLogger):
    """What processes other than the first write down: nothing."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass

    def begin(self, step: int, seconds: float) -> None:
        pass

    def seconds(self) -> float:
        return 0.0

    def cut(self, *_: Any) -> None:
        pass

    def step(self, *_: Any) -> None:
        pass

    def validation(self, *_: Any) -> None:
        pass

    def sync(self) -> dict[str, str | None]:
        return {}

    def saved(self, *_: Any) -> None:
        pass


def _asked(seconds: float) -> int:
    """How long before the end a job should be asked to stop: twice a save, in whole minutes, five at least."""
    return max(300, 60 * math.ceil(2 * seconds / 60))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
