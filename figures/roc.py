"""How well a number tells bad cases from good ones: AUC, a threshold, hits and false alarms.

High values are suspect throughout; turn the sign of a signal that is suspect where it is low.
"""

import itertools


def auc(bad: list[float], good: list[float]) -> float | None:
    """P(a bad case has a higher value than a good one), a tie counting half; None if one is empty.

    That is the area under the ROC curve (Hanley & McNeil 1982). 0.5 is chance. It is the sum of the
    bad cases' ranks less its smallest possible value, n (n + 1) / 2, over the number of pairs.
    """
    if not bad or not good:
        return None
    rank_of, before = {}, 0
    for value, equal in itertools.groupby(sorted([*bad, *good])):
        count = len(list(equal))
        rank_of[value] = before + (count + 1) / 2  # ranks from 1 on; equal values share the mean
        before += count
    ranks = sum(rank_of[value] for value in bad)
    return (ranks - len(bad) * (len(bad) + 1) / 2) / (len(bad) * len(good))


def rates(alarms: list[bool], is_bad: list[bool]) -> tuple[float, float]:
    """(share of the bad cases with an alarm, share of the good ones with one)."""
    hits = [alarm for alarm, bad in zip(alarms, is_bad, strict=True) if bad]
    false = [alarm for alarm, bad in zip(alarms, is_bad, strict=True) if not bad]
    return sum(hits) / len(hits), sum(false) / len(false)


def best_threshold(values: list[float], is_bad: list[bool]) -> float:
    """Youden's threshold: an alarm at `value >= threshold` has the most hits less false alarms.

    It is halfway between two neighbouring values, or the lowest value. Of equally good ones it is
    the highest, which raises the fewest alarms. Both kinds of cases must be there.
    """
    found = sorted(set(values))
    candidates = [found[0], *((a + b) / 2 for a, b in itertools.pairwise(found))]

    def gain(threshold):
        hits, false = rates([value >= threshold for value in values], is_bad)
        return hits - false

    return max(reversed(candidates), key=gain)  # max keeps the first of equals, here the highest


def leave_one_out(runs: list[list[tuple[float, bool]]]) -> tuple[float, float] | None:
    """(hits, false alarms) where each run is judged by the threshold of all the others.

    runs: for each run, (value, is it bad) of its points. None if some threshold has nothing to go
    by, because the other runs are all good or all bad.
    """
    alarms, is_bad = [], []
    for number, run in enumerate(runs):
        others = [point for other in runs[:number] + runs[number + 1 :] for point in other]
        if len({bad for _, bad in others}) < 2:
            return None
        threshold = best_threshold(*map(list, zip(*others, strict=True)))
        alarms += [value >= threshold for value, _ in run]
        is_bad += [bad for _, bad in run]
    return rates(alarms, is_bad)
