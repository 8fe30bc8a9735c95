"""Compile the native modules while the package is being installed; see native.py for the recipe."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        package = Path(self.root, "src", "mamba_scan")
        spec = importlib.util.spec_from_file_location("native", package / "native.py")
        assert spec is not None and spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        modules = native.install_time_modules(package, os.environ.get("MAMBA_SCAN_BUILD", "auto"))
        if modules:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["artifacts"] += [str(module.relative_to(self.root)) for module in modules]
