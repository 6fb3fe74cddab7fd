"""extract-latents: captioned images -> a latents store.

In: a recipe and a source (anything `data.listing` knows, or `shapes:N[:SEED]`). Out: a latents artifact. An interrupted
extraction continues at the first missing shard and ends in the same bytes. Does not know what the latents are for.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.latents.index import INDEX
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.latents.writer import StoreWriter
from bifrost_cli.data.latents.zarr_layout import StoreLayout
from bifrost_cli.data.sources.item import Problem, SourceError
from bifrost_cli.data.sources.scan import Sample, Scan, refuse_too_many
from bifrost_cli.errors import DiskFull, Stopped
from bifrost_cli.extraction.choose_source import choose_source, digest, listed, refuse_output, scan_source, write_events
from bifrost_cli.extraction.encode import ShardRows, encode_shard
from bifrost_cli.loading.loaders import ModelLoader, encoder_errors
from bifrost_cli.models.encoders import Encoder, VaeEncoder
from bifrost_cli.runtime import distributed
from bifrost_cli.runtime.launch import StopFlag, together
from bifrost_cli.runtime.ui import Ui

PREPROCESSING = {"orientation": "exif", "colour": "srgb", "frame": "first", "crop": "centre"}


@together
def extract_latents(
    recipe: Recipe,
    *,
    source: Path | str | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> Artifact | dict[str, Any]:
    """Encode every usable image of `source` (None: the built-in world) and return the latents artifact.

    With `dry_run` the plan is returned and nothing is written. UsageError (2): an output inside the source, or one that
    is no folder of ours. DiskFull (3). DataError (4): see `scan`. StoreError (5): the output holds latents of another
    setup, or is being written. Stopped (75): SIGTERM or Ctrl-C; the same command continues.
    """
    ui = ui or Ui()
    chosen = choose_source(source, recipe, ui)
    refuse_output(chosen, output, workspace)
    scanned = distributed.run_on_main(
        lambda: scan_source(chosen, recipe, Path(workspace), ui)
    )  # every image is read once
    loader = ModelLoader(recipe.models, device)
    encoder = loader.encoder(recipe.latents, recipe.images)
    with encoder_errors("images.output_size"):
        vae = VaeEncoder(loader.vae(), recipe.images.output_size) if recipe.latents.vae else None
    job = ExtractionRun(recipe, chosen, scanned, encoder, vae, loader.device, ui)
    path = Path(output or default_path(workspace, "latents", identity_id("latents", job.identity)))
    return job.plan(path) if dry_run else job.run(path)


class ExtractionRun:
    """One extraction: what is encoded, by what, into which layout."""

    def __init__(
        self,
        recipe: Recipe,
        source: str,
        scanned: Scan,
        encoder: Encoder,
        vae: VaeEncoder | None,
        device: torch.device,
        ui: Ui,
    ) -> None:
        self.recipe, self.source, self.scanned, self.device, self.ui = recipe, source, scanned, device, ui
        self.encoder, self.vae = encoder, vae
        self.failed: list[Problem] = []
        rules = recipe.latents
        self.described = {
            "encoder": encoder.identity,
            "painter": vae.identity if vae else None,
            "preprocessing": {**PREPROCESSING, "background": recipe.images.background},
        }
        self.layout = StoreLayout(
            len(scanned.samples),
            encoder.grid,
            encoder.channels,
            vae.shape if vae else None,
            rules.shard_rows,
            rules.chunk_rows,
            rules.storage,
        )
        self.identity = {
            **self.described,
            "samples": digest(scanned.samples),
            "rows": len(scanned.samples),
            "shard_rows": rules.shard_rows,
            "chunk_rows": rules.chunk_rows,
            **({} if rules.storage == "float16" else {"storage": rules.storage}),
        }

    def plan(self, path: Path) -> dict[str, Any]:
        """What the extraction will do and need; sizes in bytes, before compression."""
        return {
            "output": str(path),
            "encoder": f"{self.encoder.identity['name']} ({self.encoder.identity['weights'][:12]})",
            "grid": list(self.layout.grid),
            "channels": self.layout.channels,
            **self.scanned.funnel,
            "shards": self.layout.shards,
            "disk_needed": self._bytes(self.layout.rows),
            "disk_free": _free(path),
            "memory_of_a_shard": self._bytes(min(self.layout.rows, self.layout.shard_rows)) * self._copies(),
            "device": str(self.device),
        }

    def run(self, path: Path) -> Artifact:
        """Write what is missing, then the manifest."""
        with distributed.main_context(lambda: Draft.open(path, "latents", self.identity)) as draft:
            if distributed.run_on_main(lambda: draft is not None and draft.complete is not None):
                self.ui.say(f"{path} holds these latents already")
                return Artifact.open(path)
            started = time.monotonic()
            writer = self._writer(draft, path)
            missing = distributed.run_on_main(lambda: self._begin(writer, path))
            with distributed.raise_together():
                self._fill(writer, missing[distributed.rank() :: distributed.world()], path)
            failed = sum(distributed.all_gather_object(self.failed), [])
            distributed.run_on_main(lambda: self._finish(draft, writer, missing, failed, started))
        return Artifact.open(path)

    def _writer(self, draft: Draft | None, path: Path) -> StoreWriter:
        if draft is None:
            return StoreWriter.beside(path, self.layout)
        return StoreWriter(draft, self.layout, self.described)

    def _begin(self, writer: StoreWriter, path: Path) -> list[int]:
        """The shards to write, when there is room for them."""
        write_events(path, self.scanned.events)
        missing = writer.missing_shards()
        rows = self._rows(missing)
        self._require_room(path, rows)
        if len(missing) < self.layout.shards:
            self.ui.say(f"continuing: {self.layout.rows - rows} of {self.layout.rows} rows are there")
        if distributed.world() > max(1, len(missing)):
            self.ui.say(f"{len(missing)} shards are to be written: {distributed.world() - len(missing)} of the "
                        f"{distributed.world()} processes have nothing to do")  # fmt: skip
        return missing

    def _fill(self, writer: StoreWriter, shards: list[int], path: Path) -> None:
        """Encode and write this process's shards."""
        with StopFlag() as stop, self.ui.progress(self._rows(shards), "encoding images") as bar:
            for shard in shards:
                if stop.requested or distributed.other_process_failed():
                    written = len(list((path / INDEX).glob("*.jsonl")))
                    raise Stopped(
                        f"stopped before shard {shard}; {written} of {self.layout.shards} are written",
                        at=str(path),
                        fix="give the same command again; it continues there",
                    )
                self._write(writer, shard, bar, path)

    def _finish(
        self, draft: Draft | None, writer: StoreWriter, missing: list[int], failed: list[Problem], started: float
    ) -> None:
        """What follows when every shard is written: the attributes, the manifest, and what there is to say."""
        assert draft is not None  # in the first process
        if failed:
            write_events(draft.path, failed, append=True)
        writer.take_in()
        statistics = writer.finish()
        seconds, encoded = time.monotonic() - started, self._rows(missing)
        artifact = draft.commit(
            {
                "recipe": self.recipe.model_dump(mode="json"),
                "source": str(self.source),
                "funnel": self.scanned.funnel,
                "counts": self.scanned.counts,
                "statistics": _summary(statistics),
            },
            made={"device": str(self.device), "seed": None},
            cost={"device": str(self.device), "samples": encoded},
        )
        self._report(artifact, statistics, encoded, seconds)

    def _rows(self, shards: list[int]) -> int:
        return sum(len(self._samples(shard)) for shard in shards)

    def _write(self, writer: StoreWriter, shard: int, bar: Any, path: Path) -> None:
        rows = encode_shard(self._samples(shard), self.encoder, self.vae, self.recipe.latents.batch_size, bar)
        self._judge_failed(rows, path)
        writer.write_shard(shard, rows.latents_NPC, rows.lines, rows.vae_Nchw)

    def _judge_failed(self, rows: ShardRows, path: Path) -> None:
        """Images that changed since the scan: an event each, and the recipe's rules for bad images."""
        if not rows.failed:
            return
        failed = [Problem("failed", line["key"], line["notes"][0]) for line in rows.failed]
        if distributed.rank() == 0:
            write_events(path, failed, append=True)
        else:
            self.failed += failed  # the first process writes them at the end
        rules = self.recipe.latents
        if rules.bad_image == "stop":
            raise SourceError(
                f"{len(failed)} images of {self.source} changed during the run",
                failed,
                fix="extract again, in another place (-o)",
                code="BF-DATA-003",
            )
        bad = [event for event in self.scanned.events if event.event == "bad-image"]
        refuse_too_many([*bad, *failed], self.scanned.funnel["seen"], self.source, rules)

    def _samples(self, shard: int) -> tuple[Sample, ...]:
        return self.scanned.samples[self.layout.span(shard)]

    def _bytes(self, rows: int) -> int:
        return rows * self.layout.row_bytes

    def _copies(self) -> int:
        """A shard in 8 bits is in memory before and after its rounding too, in 16 bits each."""
        return 5 if self.layout.storage == "int8" else 1

    def _require_room(self, path: Path, rows: int) -> None:
        need, free = self._bytes(rows), _free(path)
        if need > free:
            raise DiskFull(
                f"{rows} rows of latents do not fit on the disk of {path}",
                at=f"need {need:,} bytes, free {free:,}",
                fix="free some space, or write elsewhere with -o; finished shards are kept",
            )

    def _report(self, artifact: Artifact, statistics: dict[str, Any], encoded: int, seconds: float) -> None:
        store = LatentsStore.open(artifact)
        funnel = {**self.scanned.funnel, "used": store.rows}
        self.ui.say("funnel: " + listed(funnel))
        if self.scanned.counts:
            self.ui.say("counted: " + listed(self.scanned.counts))
        if store.rows < self.layout.rows:
            self.ui.say(
                f"failed: {self.layout.rows - store.rows} images changed during the run, see {artifact.path}/work"
            )
        self.ui.say(
            f"channels: {store.channels}, mean {_range(statistics['mean'])}, std {_range(statistics['std'])}; "
            f"mean norm of a token {statistics['norm']:.4g}"
        )
        shape = "x".join(map(str, (*store.grid, store.channels)))
        self.ui.say(
            f"latents: {artifact.path} ({artifact.id}), {store.rows} rows of {shape}, "
            f"{encoded / max(seconds, 1e-9):.1f} images/s"
        )


def _free(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free


def _summary(statistics: dict[str, Any]) -> dict[str, Any]:
    """For the manifest; the values of every channel are in the store's attributes."""
    ranges = {name: [min(statistics[name]), max(statistics[name])] for name in ("mean", "std")}
    return {"tokens": statistics["tokens"], "norm": statistics["norm"], **ranges}


def _range(values: list[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}"
