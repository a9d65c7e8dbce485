"""What a trainer logs of the steps' books: sums since the last log, and what is newest."""

from collections import defaultdict

from inrun.attributor import Attributor

_SUMS = ("value", "unexplained", "momentum", "decay")  # nats


class Books:
    """Adds up the rows of the steps whose values are final, until they are taken."""

    def __init__(self, seen: int = 0) -> None:
        self._found: dict[str, float] = {}
        self._sums: dict[str, float] = defaultdict(float)
        self._seen = seen

    def add(self, attributor: Attributor) -> None:
        """The books of the step just taken, and of those that became final with it; of one seen before, nothing."""
        if attributor.step == self._seen:
            return
        self._seen = attributor.step
        for rows in attributor.rows:
            for target, row in rows.items():
                for name in _SUMS:
                    if row.get(name) is not None:
                        self._sums[f"inrun/{target}/{name}"] += float(row[name])
                if row.get("loss") is not None:
                    self._found[f"inrun/{target}/loss"] = float(row["loss"])
                if row.get("conservation") is not None:
                    largest = max(self._found.get("inrun/conservation", 0.0), float(row["conservation"]))
                    self._found["inrun/conservation"] = largest

    def taken(self) -> dict[str, float]:
        """What there is since the last time, by the name under which it is logged."""
        taken = {**self._sums, **self._found}
        self._sums.clear()
        self._found.clear()
        return taken
