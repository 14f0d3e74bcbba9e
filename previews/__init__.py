"""Preview deployments: one Hugging Face Space per git branch. See `python -m previews --help`."""

import time

PROCESS_START = time.monotonic() - time.process_time()  # on the monotonic clock
