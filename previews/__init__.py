"""Previews: every git branch is a Space of its own. `python -m previews --help`; nothing here imports the rest."""

import time

STARTED = time.monotonic() - time.process_time()  # when this program began, on the monotonic clock
