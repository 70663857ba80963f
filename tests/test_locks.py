"""Locks of files: held once, by any name of the file, and left out where the file system has none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import filelock
import pytest

from ringmark.data.locks import lock, lock_file


def test_a_lock_is_held_once_and_waited_for(tmp_path):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.touch()
    link.symlink_to(path)
    held = lock(path, wait=False)
    assert lock_file(link) == lock_file(path) == tmp_path / ".a.json.lock"
    with pytest.raises(filelock.Timeout):
        lock(link, wait=False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(partial(lock, link, wait=True))
        assert not waiting.done()
        held.release()
        waiting.result(10).release()


@pytest.mark.parametrize("error", [NotImplementedError, PermissionError])
def test_where_there_are_no_locks_there_is_a_warning(tmp_path, monkeypatch, caplog, error):
    def acquire(self):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert lock(tmp_path / "a.json", wait=True) is None and "a.json: cannot be locked here" in caplog.text
