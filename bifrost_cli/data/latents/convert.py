"""A latents store of an older format, written again in the newest one: the same rows, statistics and id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.latents.writer import StoreWriter
from bifrost_cli.data.latents.zarr_layout import FORMAT, read_index
from bifrost_cli.errors import UsageError
from bifrost_cli.runtime.ui import Ui


def convert_store(source: Artifact, output: Path, ui: Ui | None = None) -> Artifact:
    """Copy a store into the newest format; the same call continues a copy that was interrupted. Every byte of the old
    one is compared with its manifest on the way.

    Args:
        source: the store; it stays as it is.
        output: folder of the copy.
        ui: hears how far it is.

    Returns:
        The copy, which has the id of `source`.

    Raises:
        UsageError: (2) the store is of the newest format already, or the output is not ours to write.
        StoreError: (5) the store is damaged, or the output holds another one.
        DiskFull: (3) the same call continues.
    """
    store = LatentsStore.open(source, verify=True)
    layout = store.layout
    if layout.format == FORMAT:
        raise UsageError(f"{source.path} has store format {FORMAT} already, the newest", fix="use it as it is")
    with Draft.open(output, "latents", source.identity) as draft:
        if draft.complete:
            return draft.complete
        described = {name: value for name, value in store.attributes.items() if name not in layout.attributes}
        writer = StoreWriter(draft, replace(layout, format=FORMAT), described)
        missing = writer.missing_shards()
        with (ui or Ui()).progress(len(missing), "shards") as bar:
            for shard in missing:
                index = read_index(source.path, shard)
                writer.write_stored(shard, store.stored.of_shard(shard), index.lines, index.sums)
                bar.advance()
        writer.finish()
        made = {name: source.manifest["made"].get(name) for name in ("device", "seed")}
        return draft.commit(source.info, made=made, cost=source.manifest["cost"], hashed=writer.files)
