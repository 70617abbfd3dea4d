"""Adds up the records of a round's clients: the state's totals, and the line of metrics.jsonl."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from fedq.learning.failures import FAILURES, TooFewClients
from fedq.learning.guard import NormGuard
from fedq.learning.round import ClientRecord
from fedq.learning.state import ServerState
from fedq.learning.task import Task

log = logging.getLogger(__name__)


def counted(
    state: ServerState, records: Sequence[ClientRecord], guard: NormGuard | None, simulated: float = 0.0
) -> ServerState:
    """Returns the state with the cohort's bits and simulated seconds added, and logs the cohort's failures."""
    failed: dict[str, list[int]] = {}
    for record in records:
        if record.failure:
            failed.setdefault(record.reason, []).append(record.client)
    for reason, (first, *others) in failed.items():
        who = f"{first} and {len(others)} more are" if others else f"{first} is"
        log.warning("round %d: client %s left out: %s", state.round + 1, who, reason)
    norms = [record.norm for record in records if record.norm is not None]
    lost = {record.client for record in records if record.failure == "lost"}
    return replace(
        state,
        broadcasted_bits=state.broadcasted_bits + sum(record.broadcast_bits for record in records),
        aggregated_bits=state.aggregated_bits + sum(record.bits for record in records),
        reported_bits=state.reported_bits + sum(record.report_bits for record in records),
        norm=guard.update(state.norm, norms) if guard else state.norm,
        simulated_seconds=state.simulated_seconds + simulated,
        last_received={c: rounds for c, rounds in state.last_received.items() if c not in lost},
    )


def counts_of(records: Sequence[ClientRecord], seconds: dict[str, float]) -> dict[str, float]:
    """Returns the metrics of a cohort that add up over cohorts; `uploads` are the messages that clients sent."""
    failures = [record.failure for record in records if record.failure]
    return {
        "clients_failed": len(failures),
        **{f"clients_failed/{kind}": failures.count(kind) for kind in FAILURES},
        "uploads": sum(record.bits > 0 for record in records),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
    }


def metrics_of(
    task: Task, before: ServerState, after: ServerState, records: Sequence[ClientRecord], seconds: dict[str, float]
) -> dict[str, float]:
    """Returns a round's metrics; the loop adds the wall time and the test set's metrics."""
    usable = [record for record in records if not record.failure]
    sums = [record.training.sums for record in usable]
    trained = task.metrics({name: sum(one[name] for one in sums) for name in sums[0]})
    simulated = {"cumulative_simulated_seconds": after.simulated_seconds} if "simulated" in seconds else {}
    return {
        "round": before.round,
        **{f"train/{name}": trained[name] for name in ("loss", task.headline)},
        "broadcast_bits": after.broadcasted_bits - before.broadcasted_bits,
        "aggregated_bits": after.aggregated_bits - before.aggregated_bits,
        "report_bits": after.reported_bits - before.reported_bits,
        "cumulative_broadcasted_bits": after.broadcasted_bits,
        "cumulative_aggregated_bits": after.aggregated_bits,
        "cumulative_reported_bits": after.reported_bits,
        "clients": len(usable),
        **counts_of(records, seconds),
        **simulated,
    }


def too_few(
    sent: ServerState, records: Sequence[ClientRecord], seconds: dict[str, float], least: int, follows: bool
) -> TooFewClients:
    """Returns the error of a round with fewer than `least` usable answers.

    sent: The state before the round, with the bits of the answers counted.
    records: The records of the cohort.
    seconds: The seconds of each phase.
    least: The number of answers that a round needs.
    follows: Whether the server counts which broadcasts each client has; see `Protocol.follows`.
    """
    usable = [record.client for record in records if not record.failure]
    reasons = [f"; client {record.client}: {record.reason}" for record in records if record.failure]
    # clients that answered are up to date with the rounds before this one
    caught_up = dict.fromkeys(usable, sent.round) if follows else {}
    return TooFewClients(
        f"round {sent.round + 1}: {len(usable)} of {len(records)} clients sent a usable update, "
        f"the round needs {max(least, 1)}{''.join(reasons[:1])}",
        replace(sent, repeats=sent.repeats + 1, last_received=sent.last_received | caught_up),
        counts_of(records, seconds),
    )
