"""A round's line of metrics.jsonl, from the states around the round and the records of its clients."""

from collections.abc import Sequence

from fedq.learning.failures import FAILURES
from fedq.learning.round import ClientRecord
from fedq.learning.state import ServerState
from fedq.learning.task import Task


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
    sums = [record.training.all_sums for record in usable]
    trained = task.metrics({name: sum(one[name] for one in sums) for name in sums[0]})
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
    }
