"""An installation as commands use it."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
COMMAND = """
import importlib.abc, sys, threading, time
from pathlib import Path
from pipelines.workspace import Workspace

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers.utils":  # while transformers is being imported
            time.sleep(1.0)

sys.meta_path.insert(0, Slow())
workspace = Workspace.here()
with workspace.fleet(num_threads=1, max_hosts=1) as start:
    time.sleep(0.5)
    while any(thread.name.startswith("task") for thread in threading.enumerate()) and "transformers" not in sys.modules:
        time.sleep(0.01)  # until a host that runs already imports it
    workspace.resolver(Path.cwd())
    from transformers import AutoTokenizer
    assert start().num_hosts == 1
"""


def test_a_command_and_its_hosts_in_the_same_process_do_not_import_their_libraries_at_once(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "LORAFLEET_LAUNCHER": "in-process"}
    environment |= {"LORAFLEET_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", COMMAND], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
