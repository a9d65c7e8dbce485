"""The values of a run in a folder of Parquet parts: written while training, read by any Parquet engine."""

from inrun.ledger.examples import write_examples
from inrun.ledger.reader import Ledger
from inrun.ledger.schema import LedgerError
from inrun.ledger.writer import LedgerWriter

__all__ = ["Ledger", "LedgerError", "LedgerWriter", "write_examples"]
