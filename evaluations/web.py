"""The HTTP client that huggingface_hub brings along: httpx, or its successor httpx2."""

from importlib import import_module
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

httpx: Any = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
