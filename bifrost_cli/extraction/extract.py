"""extract-latents: captioned images -> a latents store. The source is anything `data.sources.listing` knows, or
`shapes:N[:SEED]`. An interrupted extraction continues at the first missing shard and ends in the same bytes. Does not
know what the latents are for."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.draft import seen_from
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.images import BadImage, DecodedImage, square
from bifrost_cli.data.latents.background import AHEAD, BackgroundWriter
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.latents.writer import RowBatch, StoreWriter
from bifrost_cli.data.latents.zarr_layout import INDEX, OK, StoreLayout
from bifrost_cli.data.sources.item import Problem, SourceError
from bifrost_cli.data.sources.scan import Job, Sample, Scan, listed, refuse_too_many
from bifrost_cli.data.sources.several import as_one
from bifrost_cli.errors import DiskFull, EnvironmentProblem, Stopped, StoreError, memory_errors
from bifrost_cli.extraction.source import changes, digest, refuse_output, scan_source, write_events
from bifrost_cli.loading.loaders import ModelLoader, encoder_errors, files_between
from bifrost_cli.models.encoders import Encoder, VaeEncoder
from bifrost_cli.runtime import distributed
from bifrost_cli.runtime.ahead import MOST_THREADS
from bifrost_cli.runtime.launch import StopFlag, together
from bifrost_cli.runtime.ui import Counter, Ui

Squares = tuple[np.ndarray, np.ndarray | None, dict[str, Any]]  # an image at the encoders' sizes, and its index line


@together
def extract_latents(
    recipe: Recipe,
    *,
    source: Path | str | Sequence[Path | str] | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> Artifact | dict[str, Any]:
    """Encode every usable image of a source into a latents store; the same call continues an interrupted one.

    Args:
        recipe: its `latents`, `images` and `models` sections decide what is stored.
        source: whatever the command takes, or several of it; None is the built-in world.
        output: the artifact's folder; None names it by its id in `workspace`.
        workspace: folder of the default output.
        device: "auto" or a torch device.
        dry_run: return the plan and write nothing.
        ui: hears what is found and how far it is.

    Returns:
        The latents artifact, or the plan.

    Raises:
        UsageError: (2) an output inside the source, or one that is no folder of ours.
        DiskFull: (3) before anything is written, as far as that can be known.
        DataError: (4) images or captions that the recipe does not let pass.
        StoreError: (5) the output holds latents of another setup, or is being written.
        Stopped: (75) SIGTERM or Ctrl-C; the same call continues.
    """
    ui, shapes = ui or Ui(), recipe.shapes
    given = [source] if isinstance(source, (Path, str)) else list(source or ())
    chosen = as_one([str(part) for part in given]) if given else f"{shapes.world}:{shapes.rows}:{shapes.seed}"
    ui.say(f"source: {chosen}" + ("" if given else " (none given: the built-in world)"))
    refuse_output(chosen, output, workspace)
    alone, first = distributed.world() == 1, distributed.rank() == 0
    job = Job(distributed.run_on_main, distributed.part, distributed.all_gather_object, alone, first)
    scanned = scan_source(chosen, recipe, Path(workspace), ui, job)
    loader = ModelLoader(recipe.models, device)
    encoder = loader.encoder(recipe.latents, recipe.images)
    with encoder_errors("images.output_size"):
        vae = VaeEncoder(loader.vae(), recipe.images.output_size) if recipe.latents.vae else None
    run = ExtractionRun(recipe, chosen, scanned, encoder, vae, loader.device, ui)
    path = Path(output or default_path(workspace, "latents", identity_id("latents", run.identity)))
    return run.plan(path) if dry_run else run.run(path)


class ExtractionRun:
    """One extraction: what is encoded, by what, into which layout."""

    def __init__(self, recipe: Recipe, source: str, scanned: Scan, encoder: Encoder, vae: VaeEncoder | None,
                 device: torch.device, ui: Ui) -> None:  # fmt: skip
        self.recipe, self.source, self.scanned, self.device, self.ui = recipe, source, scanned, device, ui
        self.encoder, self.vae = encoder, vae
        self.failed: list[Problem] = []
        rules, rows = recipe.latents, len(scanned.samples)
        preprocessing = {"orientation": "exif", "colour": "srgb", "frame": "first", "crop": "centre",
                         "background": recipe.images.background}  # fmt: skip
        self.described = {"encoder": encoder.identity, "painter": vae and vae.identity, "preprocessing": preprocessing}
        self.layout = StoreLayout(rows, encoder.grid, encoder.channels, vae.shape if vae else None, rules.shard_rows,
                                  rules.chunk_rows, rules.storage)  # fmt: skip
        storage = {} if rules.storage == "float16" else {"storage": rules.storage}
        self.identity = {**self.described, "samples": digest(scanned.samples), "rows": rows,
                         "shard_rows": rules.shard_rows, "chunk_rows": rules.chunk_rows, **storage}  # fmt: skip

    def plan(self, path: Path) -> dict[str, Any]:
        """What the extraction will do and need; sizes in bytes."""
        layout = self.layout
        batches = AHEAD + (8 if layout.storage == "int8" else 4)  # read, encoded, waiting and written, in 16 bits
        memory = batches * self.recipe.latents.batch_size * replace(layout, storage="float16").row_bytes
        encoder = f"{self.encoder.identity['name']} ({self.encoder.identity['weights'][:12]})"
        return {"output": str(path), "encoder": encoder, "grid": list(layout.grid), "channels": layout.channels,
                **self.scanned.funnel, "shards": layout.shards, "disk_needed": layout.rows * layout.row_bytes,
                "disk_free": _free(path), "memory_of_batches": memory, "device": str(self.device)}  # fmt: skip

    def run(self, path: Path) -> Artifact:
        """Write what is missing, then the manifest."""
        with distributed.main_context(lambda: self._open(path)) as draft:
            if distributed.run_on_main(lambda: draft is not None and draft.complete is not None):
                self.ui.say(f"{path} holds these latents already")
                return Artifact.open(path)
            started = time.monotonic()
            writer = StoreWriter(draft or path, self.layout, self.described)
            missing = distributed.run_on_main(lambda: self._begin(writer))
            with distributed.raise_together():
                self._fill(writer, missing[distributed.rank() :: distributed.world()])
            failed = sum(distributed.all_gather_object(self.failed), [])
            distributed.run_on_main(lambda: self._finish(draft, writer, missing, failed, started))
        return Artifact.open(path)

    def _open(self, path: Path) -> Draft:
        """The draft. StoreError: other latents are there; where their images are others, with what changed."""
        try:
            return Draft.open(path, "latents", self.identity)
        except StoreError as error:
            told = changes(path, self.scanned.samples)
            error.at = re.sub(r"samples: [^;]*", f"samples: {told}", error.at or "") if told else error.at
            if told and re.fullmatch(r"(rows: [^;]*; )?samples: [^;]*", error.at or ""):
                error.message = error.message.replace("a different setup", "other images or captions")
            raise

    def _begin(self, writer: StoreWriter) -> list[int]:
        """The shards to write, when there is room for them."""
        write_events(writer.path, self.scanned.events)
        missing, of = writer.missing_shards(), self.layout.rows
        rows, processes = self._rows(missing), distributed.world()
        need, free = rows * self.layout.row_bytes, _free(writer.path)
        if need > free:
            raise DiskFull(f"{rows} rows of latents do not fit on the disk of {writer.path}",
                           at=f"need {need:,} bytes, free {free:,}",
                           fix="free some space, or write elsewhere with -o; finished shards are kept")  # fmt: skip
        if len(missing) < self.layout.shards:
            self.ui.say(f"continuing: {of - rows} of {of} rows are there")
        if processes > max(1, len(missing)):
            idle = f"{processes - len(missing)} of the {processes} processes have nothing to do"
            self.ui.say(f"{len(missing)} shards are to be written: {idle}")
        return missing

    def _fill(self, writer: StoreWriter, shards: list[int]) -> None:
        """Encode and write this process's shards."""
        progress = self.ui.progress(self._rows(shards), "encoding images")
        with StopFlag() as stop, progress as bar, BackgroundWriter(writer) as background:
            for shard in shards:
                if stop.requested or distributed.other_process_failed():
                    background.flush()
                    written = len(list((writer.path / INDEX).glob("*.jsonl")))
                    raise Stopped(f"stopped before shard {shard}; {written} of {self.layout.shards} are written",
                                  at=str(writer.path), fix="give the same command again; it continues there"
                                  )  # fmt: skip
                samples = self.scanned.samples[self.layout.span(shard)]
                background.write_shard(shard, self._encode(samples, writer.path, bar))

    def _encode(self, samples: Sequence[Sample], path: Path, bar: Counter) -> Iterator[RowBatch]:
        """Latents, VAE latents and index lines of one shard. An image that is gone or changed since the scan becomes a
        failed row, whose values mean nothing. Batches begin at the shard's first row and a failed image is encoded as
        an empty one, so that a row's numbers depend on nothing but its shard."""
        failed: list[Problem] = []
        sizes = self.encoder.image_size, self.vae.image_size if self.vae else None
        for batch in _batches(samples, *sizes, self.recipe.latents.batch_size):
            inputs, outputs, lines = zip(*batch, strict=True)
            smaller = f"--set latents.batch_size={max(1, len(batch) // 2)}"
            with memory_errors(f"encoding {len(batch)} images at once", smaller):
                # What does not fit in float16 becomes infinite, which the store's writer refuses by name.
                latents_NPC = self.encoder.encode(np.stack(inputs)).to("cpu", torch.float16).numpy()
                vae_NCHW = None
                if self.vae is not None:
                    vae_NCHW = self.vae.encode(np.stack(outputs)).to("cpu", torch.float16).numpy()
            failed += [Problem("failed", line["key"], line["notes"][0]) for line in lines if line["status"] != OK]
            bar.advance(len(batch))
            yield RowBatch(latents_NPC, vae_NCHW, lines)
        if failed:
            self._judge(failed, path)

    def _judge(self, failed: list[Problem], path: Path) -> None:
        """Images that changed since the scan: an event each, and the recipe's rules for bad images."""
        if distributed.rank() == 0:
            write_events(path, failed, append=True)
        else:
            self.failed += failed  # the first process writes them at the end
        if self.recipe.latents.bad_image == "stop":
            raise SourceError(f"{len(failed)} images of {self.source} changed during the run", failed,
                              fix="extract again, in another place (-o)", code="BF-DATA-003")  # fmt: skip
        bad = [event for event in self.scanned.events if event.event == "bad-image"]
        refuse_too_many([*bad, *failed], self.scanned.funnel["seen"], self.source, self.recipe.latents)

    def _finish(
        self, draft: Draft | None, writer: StoreWriter, missing: list[int], failed: list[Problem], started: float
    ) -> None:
        """What follows when every shard is written: the attributes, the manifest, and what there is to say."""
        assert draft is not None  # in the first process
        if failed:
            write_events(draft.path, failed, append=True)
        statistics = writer.finish()
        seconds, encoded = time.monotonic() - started, self._rows(missing)
        ranges = {name: (min(statistics[name]), max(statistics[name])) for name in ("mean", "std")}
        # The values of every channel are in the store's attributes.
        summary = {"tokens": statistics["tokens"], "norm": statistics["norm"], **ranges}
        info = {"recipe": self.recipe.model_dump(mode="json"), "source": self.source, "statistics": summary,
                "typed_in": seen_from(draft.path, Path()), "funnel": self.scanned.funnel,
                "counts": self.scanned.counts}  # fmt: skip
        with suppress(EnvironmentProblem):  # of models that are not here any more: the latents are, and whole
            info |= files_between(self.recipe)
        device = str(self.device)
        made, cost = {"device": device, "seed": None}, {"device": device, "samples": encoded}
        store = LatentsStore.open(draft.commit(info, made=made, cost=cost, hashed=writer.files))
        path, say = store.artifact.path, self.ui.say
        say("funnel: " + listed({**self.scanned.funnel, "used": store.rows}))
        if self.scanned.counts:
            say("counted: " + listed(self.scanned.counts))
        if store.rows < self.layout.rows:
            say(f"failed: {self.layout.rows - store.rows} images changed during the run, see {path}/work")
        mean, std = ("{:.4g} to {:.4g}".format(*ranges[name]) for name in ("mean", "std"))
        norm, shape = statistics["norm"], "x".join(map(str, (*store.grid, store.channels)))
        say(f"channels: {store.channels}, mean {mean}, std {std}; mean norm of a token {norm:.4g}")
        speed = encoded / max(seconds, 1e-9)
        say(f"latents: {path} ({store.artifact.id}), {store.rows} rows of {shape}, {speed:.1f} images/s")

    def _rows(self, shards: list[int]) -> int:
        return sum(len(self.scanned.samples[self.layout.span(shard)]) for shard in shards)


def _batches(samples: Sequence[Sample], size: int, output_size: int | None, count: int) -> Iterator[list[Squares]]:
    """Batches in order, the next one being read while this one is encoded; never more than two in memory."""
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        waiting: list[Future[Squares]] = []
        for start in range(0, len(samples), count):
            ahead = [pool.submit(_squares, sample, size, output_size) for sample in samples[start : start + count]]
            if waiting:
                yield [future.result() for future in waiting]
            waiting = ahead
        yield [future.result() for future in waiting]


def _squares(sample: Sample, size: int, output_size: int | None) -> Squares:
    try:
        image, status = sample.load(), OK
    except BadImage as error:
        image, status = DecodedImage(np.zeros((size, size, 3), np.uint8), (error.message,)), "failed"
    height, width = image.rgb.shape[:2]
    line = {"key": sample.key, "caption": sample.caption, "plan": sample.plan, "image": sample.sha256,
            "size": [width, height], "status": status, "notes": list(image.notes)}  # fmt: skip
    return square(image.rgb, size), square(image.rgb, output_size) if output_size else None, line


def _free(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free
