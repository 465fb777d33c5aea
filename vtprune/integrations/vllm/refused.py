"""What stands for the plugin's classes in a release of vLLM that it was not built on: it cannot be imported."""

from __future__ import annotations

from vllm import __version__  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

from vtprune.integrations.vllm import check_version

# vLLM imports this when somebody chooses one of the architectures, and shows the error
check_version(__version__)


class Refused:
    """Never reached."""
