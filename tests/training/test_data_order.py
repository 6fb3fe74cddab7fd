"""The order of rows is a permutation an epoch, does not depend on the batch size, and never changes."""

from __future__ import annotations

import pytest

from bifrost_cli.training.data_order import batch_indices, derive, held_out, permutation, uniform


def sequence(batch_size: int, count: int, rows: int = 10, seed: int = 1) -> list[int]:
    batches = (batch_indices(seed, step, batch_size, rows) for step in range(-(-count // batch_size)))
    return [row for batch in batches for row in batch][:count]


def test_every_epoch_holds_each_row_once_in_another_order():
    epochs = [sequence(1, 30)[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("batch_size", [2, 3, 7, 10, 25])
def test_the_sequence_does_not_depend_on_the_batch_size(batch_size):
    assert sequence(batch_size, 50) == sequence(1, 50)


def test_the_numbers_are_pinned():
    assert permutation(0, 0, 8).tolist() == [0, 2, 7, 1, 5, 6, 3, 4]
    assert derive(0, 5, "examine") == 1753297241883405233
    assert sequence(4, 8, seed=1) != sequence(4, 8, seed=2)


def test_uniform_is_uniform():
    draws = [uniform(0, row, "drop") for row in range(4000)]
    assert 0 <= min(draws) and max(draws) < 1
    assert abs(sum(draws) / 4000 - 0.5) < 0.02 and abs(sum(d < 0.1 for d in draws) / 4000 - 0.1) < 0.02


def test_no_rows_is_a_mistake_of_ours():
    with pytest.raises(ValueError):
        batch_indices(0, 0, 4, 0)


def test_held_out_rows_depend_on_their_keys_alone():
    keys = [f"{number:04d}" for number in range(200)]
    train, held = held_out(keys, 16)
    assert len(held) == 16 and sorted(train + held) == list(range(200))
    more_train, more_held = held_out(keys[:150], 16)
    assert {keys[row] for row in held if row < 150} <= {keys[row] for row in more_held}
    assert held_out(keys[:12], 16)[1] == held_out(keys[:12], 1)[1] and held_out(keys, 0) == (list(range(200)), [])
    with pytest.raises(ValueError):
        held_out(keys[:1], 1)


def test_both_rows_of_a_picture_are_on_one_side():
    images = [f"{i:04d}" for i in range(100)]
    keys = [key for image in images for key in (image, image + "#flip")]
    for count in range(1, 20):
        train, held = held_out(keys, count)
        sides = [{keys[row].partition("#")[0] for row in rows} for rows in (train, held)]
        shown = [keys[row].partition("#")[0] for row in held]
        assert len(held) < 4 or all(a != b for a, b in zip(shown, shown[1:] + shown[:1], strict=True))
        assert not sides[0] & sides[1] and len(held) in (count, count + 1) and len(train) + len(held) == 200
    alone = {images[row] for row in held_out(images, 5)[1]}
    assert alone == {keys[row].partition("#")[0] for row in held_out(keys, 10)[1]}, "a flip moves no picture"
    with pytest.raises(ValueError):
        held_out(["a", "a#flip"], 1)
