"""Where the parts of the test server are and with what they are started.

Every part listens on loopback only, and starts from an environment that holds nothing of the
caller's Python: the server must not see this package.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
REPO_ID = "nnsight-transcoders/builtin-model"
#: A machine with a load far above its cores takes minutes for what an idle one does in 20 s.
START_SECONDS = 1200

_HERE = Path(__file__).resolve().parent
_PORTS = (
    *("api", "redis", "store", "hub", "ray_client", "dashboard", "ray", "objects", "node"),
    *("agent_grpc", "agent", "metrics", "runtime_env"),
)


@dataclass(frozen=True)
class Layout:
    """The places of one server.

    Attributes:
        venv: Its virtual environment; its logs, state and downloads are in `venv/server`.
        first_port: The first of its ports, which follow one another.
    """

    venv: Path
    first_port: int

    @classmethod
    def from_environment(cls) -> Layout:
        """The layout that `NDIF` (a virtual environment) and `NDIF_PORT` name."""
        venv = os.environ.get("NDIF") or _HERE.parents[1] / ".venv-ndif"
        return cls(Path(venv).resolve(), int(os.environ.get("NDIF_PORT") or 8710))

    @property
    def home(self) -> Path:
        return self.venv / "server"

    @property
    def ray_dir(self) -> Path:
        """Short, since the paths of Ray's sockets may have 107 characters."""
        return Path("/tmp") / f"ndif-test-{os.getuid()}-{self.first_port}"

    def port(self, name: str) -> int:
        return self.first_port + _PORTS.index(name)

    def url(self, name: str = "api") -> str:
        return f"http://{HOST}:{self.port(name)}"

    def program(self, name: str) -> str:
        return str(self.venv / "bin" / name)

    def log(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"


def commands(layout: Layout) -> dict[str, list[str]]:
    """Part -> its command line, in the order in which they are started."""
    redis = ["redis-server", "--bind", HOST, "--port", str(layout.port("redis"))]
    redis += ["--save", "", "--appendonly", "no", "--dir", str(layout.home)]
    store = [layout.program("moto_server"), "-H", HOST, "-p", str(layout.port("store"))]
    hub = [sys.executable, str(_HERE / "ndif_hub.py"), str(layout.port("hub"))]
    api = [layout.program("gunicorn"), "--config", "python:ndif.services.api.gunicorn_conf"]
    api += ["--bind", f"{HOST}:{layout.port('api')}", "--no-control-socket", "ndif_keys:app"]
    return {"redis": redis, "store": store, "hub": hub, "ray": _ray(layout), "api": api}


def _ray(layout: Layout) -> list[str]:
    # NDIF's controller looks for these resources, and manages only nodes that show a GPU: on a
    # machine without one a made-up one is shown.
    resources = {"head": 10, "cuda_memory_bytes": 8e9, "cpu_memory_bytes": 8e9}
    options = {
        "node-ip-address": HOST,
        "port": layout.port("ray"),
        "ray-client-server-port": layout.port("ray_client"),
        "object-manager-port": layout.port("objects"),
        "node-manager-port": layout.port("node"),
        "dashboard-agent-grpc-port": layout.port("agent_grpc"),
        "dashboard-agent-listen-port": layout.port("agent"),
        "metrics-export-port": layout.port("metrics"),
        "runtime-env-agent-port": layout.port("runtime_env"),
        "include-dashboard": "true",
        "dashboard-host": HOST,
        "dashboard-port": layout.port("dashboard"),
        "temp-dir": layout.ray_dir,
        "num-cpus": 2,
        "num-gpus": 1,
        "object-store-memory": 200_000_000,
        "resources": json.dumps(resources),
    }
    start = [layout.program("ray"), "start", "--head", "--block", "--disable-usage-stats"]
    return start + [f"--{name}={value}" for name, value in options.items()]


def controller(layout: Layout) -> list[str]:
    """The command that puts NDIF's controller into Ray, where it stays."""
    return [layout.program("python"), "-m", "ndif.services.ray.deployments.controller.controller"]


def environment(layout: Layout) -> dict[str, str]:
    """What every process of the server starts with."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
    return kept | {
        "NDIF_TEST_SERVER": str(layout.home),  # the mark by which `stop` finds its processes
        "NDIF_TEST_RUNNER": str(layout.home / "runner"),
        "HOME": str(layout.home),
        "PYTHONPATH": str(_HERE / "server_side"),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": HOST,
        "HF_HOME": str(layout.home / "huggingface"),
        "HF_ENDPOINT": layout.url("hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NDIF_HOME": str(layout.home),
        "NDIF_API_URL": layout.url(),
        "NDIF_API_PORT": str(layout.port("api")),
        "NDIF_API_TIMEOUT": str(START_SECONDS),
        "NDIF_REDIS_URL": f"redis://{HOST}:{layout.port('redis')}",
        "NDIF_OBJECT_STORE_URL": layout.url("store"),
        "NDIF_OBJECT_STORE_ACCESS_KEY": "ndif",
        "NDIF_OBJECT_STORE_SECRET_KEY": "ndif-secret",
        "NDIF_RAY_ADDRESS": f"ray://{HOST}:{layout.port('ray_client')}",
        "NDIF_CONTROLLER_IMPORT_PATH": "ndif_cpu.Controller",
        "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "ndif_cpu.ModelActor",
        "NDIF_DEFAULT_DTYPE": "float32",
        "NDIF_DEFAULT_PADDING_BIAS": "0",
        "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": "600",
        "NDIF_SANDBOX_POOL_SIZE": "1",
        "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
        **_ray_environment(layout),
    }


def _ray_environment(layout: Layout) -> dict[str, str]:
    seconds, milliseconds = str(START_SECONDS), str(1000 * START_SECONDS)
    return {
        "RAY_ADDRESS": f"{HOST}:{layout.port('ray')}",
        # Otherwise Ray replaces 127.0.0.1 by the machine's own address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # With gRPC's fork support Ray's client server now and then dies silently at its start.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # other jobs of the machine are not the server's
        "RAY_enable_worker_prestart": "false",
        "RAY_prestart_worker_first_driver": "false",
        # Limits on starting, for a slow machine.
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": seconds,
        "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": seconds,
        "RAY_worker_register_timeout_seconds": seconds,
        "RAY_raylet_start_wait_time_s": seconds,
        "RAY_gcs_server_request_timeout_seconds": seconds,
        # Not the pause between them: a first attempt may come too early on any machine.
        "RAY_raylet_client_num_connect_attempts": seconds,
        "RAY_health_check_initial_delay_ms": milliseconds,
        "RAY_health_check_timeout_ms": milliseconds,
    }
