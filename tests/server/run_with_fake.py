"""The `lightvl` command as a process of its own, but with the fake service in place of engine/build.py, for
tests/server/test_cli.py. Prints which heavy modules were imported before the service was built."""

from __future__ import annotations

import sys
import types

from server_fakes import FakeService

from lightvl import cli
from lightvl.config import ServerConfig
from lightvl.errors import ConfigError
from lightvl.metrics import Metrics


def build_service(config: ServerConfig, metrics: Metrics) -> FakeService:
    print("heavy:", [name for name in ("torch", "transformers") if name in sys.modules])
    if config.model_path == "broken/model":
        raise ConfigError("the hub knows no\nbroken/model")
    return FakeService(served_name=config.model_path or "demo")


if __name__ == "__main__":
    module = types.ModuleType("lightvl.engine.build")
    module.build_service = build_service  # type: ignore[attr-defined]
    sys.modules["lightvl.engine.build"] = module
    cli.main()
