"""The account of a request says what ran, not what was hoped for."""

from __future__ import annotations

import numpy as np

from amem.engine.tally import Source, Tally


def tally(prompt: int = 10) -> Tally:
    return Tally(prompt, 0.0, "gradual", True, 4, 3.5)


def test_rows_that_ran_after_a_preemption_are_not_called_reused() -> None:
    """Found in a cache, lost with the pages, computed at last: nothing was saved."""
    account = tally()
    account.fill(0, 4, Source.PREFIX)
    account.fill(4, 9, Source.CPU)
    account.computed(np.arange(2, 10))
    report = account.report(1.0)
    assert (report.prompt.prefix, report.prompt.cpu, report.prompt.fresh) == (2, 0, 8)
    assert report.prompt.total == 10


def test_a_preempted_request_does_not_reuse_its_own_work() -> None:
    account = tally()
    account.computed(np.arange(10))
    account.fill(0, 8, Source.PREFIX)
    account.fill(8, 10, Source.CPU)
    assert account.report(1.0).prompt.fresh == 10


def test_recomputed_rows_are_those_that_were_loaded() -> None:
    account = tally()
    account.fill(0, 6, Source.DISK)
    account.recomputed(np.array([1, 5, 8]))
    account.computed(np.arange(6, 12))
    report = account.report(1.0)
    assert (report.prompt.disk, report.prompt.recomputed, report.prompt.fresh) == (4, 2, 4)
    assert report.recompute_ratio == 2 / 6
