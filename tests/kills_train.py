"""train.py that saves after every step, for tests/kills.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train

if __name__ == "__main__":
    train.SAVE_SECONDS = 0
    sys.exit(train.exit_status(train.main, (train.DataError, train.CheckpointError)))
