"""A Hub on a given loopback port that holds the builtin model, for the test server.

    python tests/ndif/ndif_hub.py PORT

Both NDIF and its client ask the Hub what a repository is called, how large it is, and for its
files.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from hub.hub_server import HubServer
from ndif_layout import REPO_ID

from nnsight_transcoders.builtin import builtin_model_path


def main(port: int) -> None:
    """Serve until the process is ended."""
    hub = HubServer()
    files = {path.name: path.read_bytes() for path in Path(builtin_model_path()).iterdir()}
    hub.add(REPO_ID, files)
    with hub.running(port):
        threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]))
