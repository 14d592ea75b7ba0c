import numpy as np
import pytest

from jaxreason.data.batches import Order, Rows
from jaxreason.data.pack import MAX_EXAMPLES, pack
from jaxreason.data.store import Store
from jaxreason.model import Execution
from jaxreason.rl.batch import row_layout

LENGTHS = np.random.default_rng(0).integers(3, 90, 500)


def rows_of(made):
    return [made.row(i).tolist() for i in range(len(made))]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_in_exactly_one_row_that_holds_it(packing, shuffle):
    rows = rows_of(pack(LENGTHS, 128, packing=packing, shuffle=shuffle, seed=1, epoch=2))
    assert sorted(example for row in rows for example in row) == list(range(500))
    assert max(LENGTHS[row].sum() for row in rows) <= 128
    assert packing or max(map(len, rows)) == 1


def test_a_function_of_seed_and_epoch():
    def make(seed, epoch):
        return rows_of(pack(LENGTHS, 128, packing=True, shuffle=True, seed=seed, epoch=epoch))

    assert make(3, 1) == make(3, 1)
    assert make(3, 1) != make(3, 2) and make(3, 1) != make(4, 1)


def test_best_fit_by_hand():
    """Lengths 7 6 5 4 3 2 1 into rows of 10: 7+3, 6+4, 5+2+1, each into the fullest row with room."""
    rows = rows_of(pack(np.array([7, 6, 5, 4, 3, 2, 1]), 10, packing=True, shuffle=True, seed=0, epoch=0))
    assert sorted(map(sorted, rows)) == [[0, 4], [1, 3], [2, 5, 6]]


def test_unshuffled_packing_keeps_the_file_order():
    rows = rows_of(pack(np.array([4, 5, 3, 8, 2, 10]), 10, packing=True, shuffle=False, seed=0, epoch=0))
    assert rows == [[0, 1], [2], [3, 4], [5]]
    unpacked = pack(np.array([4, 5, 3]), 10, packing=False, shuffle=False, seed=0, epoch=7)
    assert rows_of(unpacked) == [[0], [1], [2]]


def test_packing_fills_rows():
    made = pack(LENGTHS, 512, packing=True, shuffle=True, seed=0, epoch=0)
    assert LENGTHS.sum() / (len(made) * 512) > 0.97


def test_rows_come_in_random_order_not_by_length():
    made = pack(LENGTHS, 90, packing=True, shuffle=True, seed=0, epoch=0)
    longest = np.array([LENGTHS[row].max() for row in rows_of(made)])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_row_takes_no_more_examples_than_attention_has_segments(shuffle):
    """40 examples of 2 tokens in rows of 512: 31 and 9, since the row's rest is the 32nd segment."""
    assert MAX_EXAMPLES == 31 == Execution.max_segments - 1
    rows = rows_of(pack(np.full(40, 2), 512, packing=True, shuffle=shuffle, seed=1, epoch=0))
    assert sorted(map(len, rows)) == [9, 31]
    assert sorted(example for row in rows for example in row) == list(range(40))
    many = rows_of(pack(np.full(1000, 2), 512, packing=True, shuffle=shuffle, seed=1, epoch=0))
    assert len(many) == 33 and max(map(len, many)) == 31  # ceil(1000 / 31)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_cap_costs_nothing_where_rows_hold_fewer(shuffle, monkeypatch):
    def make():
        return rows_of(pack(LENGTHS + 10, 256, packing=True, shuffle=shuffle, seed=0, epoch=0))

    capped = make()
    assert 5 < max(map(len, capped)) < 31  # or this shows nothing
    monkeypatch.setattr("jaxreason.data.pack.MAX_EXAMPLES", 10**9)
    assert make() == capped


def test_a_capped_row_still_leaves_its_long_partner_in():
    """One of 100 tokens and 60 of 1 in rows of 200: the long one is placed first and shares its row with 30 others."""
    rows = rows_of(pack(np.array([1] * 60 + [100]), 200, packing=True, shuffle=True, seed=0, epoch=0))
    assert sorted(map(len, rows)) == [30, 31] and len(next(row for row in rows if 60 in row)) == 31


def test_rollout_rows_hold_what_the_cap_lets_through():
    places = row_layout([2] * 40, 512, rows=40, microbatches=4)
    assert len(set(places)) == 40
    assert sorted(np.unique([row for row, _ in places], return_counts=True)[1]) == [9, 31]
    assert {row % 4 for row, _ in places} == {0}  # both rows in the first microbatch; the step skips the others
    with pytest.raises(ValueError, match="40 sequences fill 2 rows of 512 tokens, and there are 1"):
        row_layout([2] * 40, 512, rows=1, microbatches=1)


def test_an_example_that_fits_no_row_is_a_defect():
    with pytest.raises(ValueError, match="does not fit"):
        pack(np.array([11]), 10, packing=True, shuffle=True, seed=0, epoch=0)


# --- batches ---------------------------------------------------------------------------------------------------------


def make_rows(lengths, starts, *, length, batch_size, packing=True, shuffle=False, seed=0, endless=True):
    """Example i holds the tokens 10 (i + 1), 10 (i + 1) + 1, ..."""
    ids = [10 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]
    offsets = np.cumsum([0, *lengths])
    tokens, answers = np.concatenate(ids).astype(np.uint16), np.array(starts)
    store = Store(tokens, offsets, np.array(starts), answers, np.arange(len(lengths)), {})
    return Rows(
        store, np.arange(len(lengths)), np.array(lengths), length=length, batch_size=batch_size,
        order=Order(packing, shuffle, seed), pad_id=7, endless=endless,
    )  # fmt: skip


def test_fields_by_hand():
    batch = make_rows([3, 4, 5], [1, 2, 4], length=9, batch_size=2).batch(0)
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 22, 23, 7, 7], [30, 31, 32, 33, 34, 7, 7, 7, 7]]
    assert batch.targets.tolist() == [[11, 12, 7, 21, 22, 23, 7, 7, 7], [31, 32, 33, 34, 7, 7, 7, 7, 7]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0, 0]]
    assert batch.sequence_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0, 0], [10, 10, 10, 10, 10, 9, 9, 9, 9]]
    assert {field.dtype.name for field in (batch.tokens, batch.targets, batch.segment_ids)} == {"int32"}
    assert batch.loss_mask.dtype == np.float32


def test_masks_come_from_lengths_not_from_ids():
    """Token 7 is both padding and an example's last, trained token."""
    rows = make_rows([3], [1], length=4, batch_size=1)
    rows._store.tokens[2] = 7
    batch = rows.batch(0)
    assert batch.tokens.tolist() == [[10, 11, 7, 7]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0]] and batch.segment_ids.tolist() == [[1, 1, 1, 0]]


def test_a_truncated_example_trains_its_last_token_and_no_stop():
    rows = make_rows([9], [2], length=4, batch_size=1)
    rows.lengths = np.array([4])
    batch = rows.batch(0)
    assert batch.tokens.tolist() == [[10, 11, 12, 13]] and batch.targets.tolist() == [[11, 12, 13, 7]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0]]


def test_epochs_follow_without_a_seam():
    """Five rows in batches of two: the third batch is the last row of the first epoch and the first of the second."""
    rows = make_rows([4] * 5, [1] * 5, length=4, batch_size=2, packing=False)
    firsts = [rows.batch(step).tokens[:, 0].tolist() for step in range(5)]
    assert firsts == [[10, 20], [30, 40], [50, 10], [20, 30], [40, 50]]
    assert [rows.num_steps(e) for e in (1, 2, 2.5, 0.4)] == [3, 5, 7, 1]
    assert [rows.steps_per_epoch(e) for e in (0, 1)] == [3, 2] and rows.rows_per_epoch(3) == 5


def test_each_epoch_has_its_own_order_with_every_example_once():
    rows = make_rows([4] * 30, [1] * 30, length=4, batch_size=10, packing=False, shuffle=True)
    epochs = [[row for step in range(3 * e, 3 * e + 3) for row in rows.batch(step).tokens[:, 0]] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [10 * (i + 1) for i in range(30)]
    assert epochs[0] != epochs[1]


def test_steps_can_be_read_in_any_order():
    def make():
        return make_rows(LENGTHS[:60] % 20 + 3, [1] * 60, length=32, batch_size=4, shuffle=True)

    straight, jumping = make(), make()
    assert straight.num_steps(3) < 21 < straight.num_steps(5)
    for step in (21, 3, 20, 0, 21):
        np.testing.assert_array_equal(straight.batch(step).tokens, jumping.batch(step).tokens)
    fresh = make()
    np.testing.assert_array_equal(fresh.batch(21).tokens, straight.batch(21).tokens)


def test_held_out_rows_end_with_empty_rows():
    rows = make_rows([4] * 3, [1] * 3, length=4, batch_size=2, packing=False, endless=False)
    assert rows.num_steps() == 2
    last = rows.batch(1)
    assert last.tokens.tolist() == [[30, 31, 32, 33], [7, 7, 7, 7]]
    assert last.loss_mask.sum(1).tolist() == [3, 0] and last.segment_ids[1].tolist() == [0, 0, 0, 0]
    with pytest.raises(IndexError):
        rows.batch(2)


def test_processes_share_a_step():
    rows = make_rows(LENGTHS[:40] % 20 + 3, [1] * 40, length=64, batch_size=4, shuffle=True)
    whole, parts = rows.batch(1), [rows.batch(1, process, 2) for process in range(2)]
    for name in ("tokens", "loss_mask", "sequence_ids"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    pairs = set(zip(whole.sequence_ids[whole.segment_ids > 0].tolist(), np.nonzero(whole.segment_ids > 0)[0].tolist()))
    segments = sum(int(row.max()) for row in whole.segment_ids)
    assert len(pairs) == len({sequence for sequence, _ in pairs}) == segments
    with pytest.raises(ValueError, match="4 is not divisible by 3"):
        rows.batch(0, 0, 3)


def test_most_segments_of_the_rows_that_a_run_reads():
    def rows(lengths, endless):
        return Rows(
            None, np.arange(len(lengths)), np.asarray(lengths), length=32, batch_size=2,
            order=Order(True, True, 0), pad_id=0, endless=endless,
        )  # fmt: skip

    assert rows([10] * 9, endless=False).max_segments(steps=1) == 4  # three examples, and the two tokens that are left
    assert rows([32] * 9, endless=True).max_segments(steps=20) == 2
    mixed = rows(np.random.default_rng(1).integers(2, 20, 40), endless=True)
    seen = [len(mixed.examples(row)) for row in range(mixed.rows_per_epoch(0) + mixed.rows_per_epoch(1))]
    assert mixed.max_segments(steps=-(-len(seen) // 2)) >= max(seen) + 1 > max(seen[: mixed.rows_per_epoch(0)])
