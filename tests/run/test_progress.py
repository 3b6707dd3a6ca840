"""The bar of progress says how much is done, and how long the rest takes."""

from flatjax.run.progress import Progress


def test_the_time_left_is_that_of_each_kind_of_work_at_its_median_pace(monkeypatch):
    now = iter([0.0, 2.0, 12.0, 14.0, 30.0, 31.0])
    monkeypatch.setattr("flatjax.run.progress.time.monotonic", lambda: next(now))
    with Progress("work", {"step": 10, "measurement": 3}) as progress:
        progress.done("step", 2)
        assert progress.seconds_left == 8 * 1
        progress.done("measurement")
        assert progress.seconds_left == 8 * 1 + 2 * 10
        progress.done("step", 1)
        progress.done("measurement")
        progress.done("step", 1)
        # Paces of a step 1, 2 and 1; of a measurement 10 and 16.
        assert progress.seconds_left == 6 * 1 + 1 * 13


def test_a_bar_has_one_total_of_all_kinds_and_counts_what_was_done_before(monkeypatch):
    now = iter([0.0, 5.0, 6.0, 26.0])
    monkeypatch.setattr("flatjax.run.progress.time.monotonic", lambda: next(now))
    with Progress("work", {"step": 10, "measurement": 3}, {"step": 1.0, "measurement": 10.0}) as progress:
        progress.were_done({"step": 6, "measurement": 1})
        assert progress.share_done == 16 / 40
        assert progress.seconds_left == 0  # nothing is known of
        progress.done("step", 2)
        assert progress.share_done == 18 / 40
        # A step takes half a second, and a measurement as long as ten steps until one is seen.
        assert progress.seconds_left == 2 * 0.5 + 2 * 5
        progress.done("measurement")
        assert progress.seconds_left == 2 * 0.5 + 1 * 20
