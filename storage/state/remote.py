"""Client of a Hugging Face Storage Bucket: huggingface_hub's bucket functions with errors that say what to do."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars


class BucketError(Exception):
    """Raised if the bucket cannot be used. The message says what to do and contains no token.

    Attributes:
        is_transient: Whether the same call may succeed later.
    """

    def __init__(self, message: str, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


class BucketClient:
    """Files of one bucket. Every method raises BucketError.

    Args:
        bucket: Id of the bucket, "owner/name".
        token: Access token; by default HF_TOKEN or that of `hf auth login`.
    """

    def __init__(self, bucket: str, token: str | None = None) -> None:
        disable_progress_bars()
        self.bucket = bucket
        self._api = HfApi(token=token)

    def is_private(self) -> bool:
        """Return whether only its owner can read the bucket."""
        with self._readable_errors():
            return self._api.bucket_info(self.bucket).private

    def list(self, folder: str) -> set[str]:
        """Return the paths of the files below a folder."""
        with self._readable_errors():
            tree = self._api.list_bucket_tree(self.bucket, prefix=folder, recursive=True)
            return {entry.path for entry in tree if entry.type == "file"}

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file; None if it does not exist."""
        with self._readable_errors():
            infos = list(self._api.get_bucket_paths_info(self.bucket, [path]))
            if not infos:
                return None
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "content"
                self._api.download_bucket_files(self.bucket, [(infos[0], target)])
                return target.read_bytes()

    def download(self, files: Sequence[tuple[str, Path]]) -> None:
        """Download files; each is a path in the bucket and where to write it."""
        with self._readable_errors():
            self._api.download_bucket_files(self.bucket, list(files), raise_on_missing_files=True)

    def upload(self, files: Sequence[tuple[Path | bytes, str]]) -> None:
        """Upload files; each is a local file or its content, and its path in the bucket. Not atomic."""
        with self._readable_errors():
            self._api.batch_bucket_files(self.bucket, add=list(files))

    def delete(self, paths: Sequence[str]) -> None:
        """Delete files."""
        with self._readable_errors():
            self._api.batch_bucket_files(self.bucket, delete=list(paths))

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client and its Xet library raise many types, some with the token in their text
            raise self._explain(error) from None

    def _explain(self, error: Exception) -> BucketError:
        bucket = f"The bucket {self.bucket}"
        if isinstance(error, OfflineModeIsEnabled):
            return BucketError(f"{bucket} cannot be reached, because HF_HUB_OFFLINE is set. Unset it.")
        if isinstance(error, EntryNotFoundError):
            return BucketError(f"{bucket} is damaged: a file of the saved state does not exist in it.")
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
        else:  # the Xet library has no types for statuses
            match = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
            status = int(match[1]) if match else 0
        match status:
            case 401:
                return BucketError(f"{bucket} rejects the token. Set STATE_BUCKET_TOKEN to a valid one.")
            case 403:
                return BucketError(f"{bucket} refuses the token. Give STATE_BUCKET_TOKEN write access to the bucket.")
            case 404:
                return BucketError(f"{bucket} does not exist, or the token has no access to it. Check STATE_BUCKET.")
            case 0:
                return BucketError(f"{bucket} cannot be reached ({type(error).__name__}). It is tried again.", True)
        message = f"{bucket} cannot be used: the Hub responded with status {status}. It is tried again."
        return BucketError(message, is_transient=status == 429 or status >= 500)
