"""Compile the native modules while a kernel package is being installed; see native.py for the recipe.

The same text beside every kernel package's pyproject.toml (``python kernels/native.py --sync``).
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):
    """Adds what ``native.install_time_modules`` built to the wheel; ``<PACKAGE>_BUILD`` is its policy."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the files of a wheel are collected; other targets hold sources only.

        Args:
            version: kind of the build, "standard" or "editable"; makes no difference here.
            build_data: what hatchling knows of the build; built modules are added to its artifacts, in place.
        """
        if self.target_name != "wheel":
            return
        (recipe,) = Path(self.root, "src").glob("*/native.py")
        spec = importlib.util.spec_from_file_location("native", recipe)
        assert spec is not None and spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        package = recipe.parent
        modules = native.install_time_modules(package, os.environ.get(f"{package.name.upper()}_BUILD", "auto"))
        if modules:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["artifacts"] += [str(module.relative_to(self.root)) for module in modules]
