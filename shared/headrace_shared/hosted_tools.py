"""Tools that a provider runs itself while it answers: what a request lets it do, and what came of that.

Each call is charged beside the tokens, and after each of them the model reads on from the beginning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never


class HostedTool(StrEnum):
    """The tools whose calls can be bounded and counted."""

    WEB_SEARCH = "web_search"
    WEB_SEARCH_PREVIEW = "web_search_preview"
    FILE_SEARCH = "file_search"
    CODE_INTERPRETER = "code_interpreter"


HOSTED_TOOLS: Mapping[object, HostedTool] = {
    **{tool.value: tool for tool in HostedTool},
    "web_search_2025_08_26": HostedTool.WEB_SEARCH,
    "web_search_preview_2025_03_11": HostedTool.WEB_SEARCH_PREVIEW,
}
"""By the type of a tool in a request."""

WEB_SEARCHES = (HostedTool.WEB_SEARCH, HostedTool.WEB_SEARCH_PREVIEW)

MAX_TOOL_CALLS = 128

SEARCHES_A_CALL = 8
"""One call to a web search may ask several queries, each of which is charged; nobody publishes how many."""


@dataclass(frozen=True, slots=True)
class Hosted:
    """What a request lets the provider do."""

    tools: tuple[HostedTool, ...]
    """At least one, in the order of `HostedTool`."""
    calls: int
    """The most calls, of all of them together."""

    @property
    def readings(self) -> int:
        """How often the model may read: at first, after each call, and after one more that is ignored."""
        return self.calls + 2


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """What one answer is charged for."""

    web_searches: int = 0
    file_searches: int = 0
    containers: int = 0
    """In which code was run: a container is charged once, however often it is used."""

    def of(self, tool: HostedTool) -> int:
        match tool:
            case HostedTool.WEB_SEARCH | HostedTool.WEB_SEARCH_PREVIEW:
                return self.web_searches
            case HostedTool.FILE_SEARCH:
                return self.file_searches
            case HostedTool.CODE_INTERPRETER:
                return self.containers
            case _:
                assert_never(tool)

    def __add__(self, other: "ToolCalls") -> "ToolCalls":
        return ToolCalls(
            self.web_searches + other.web_searches,
            self.file_searches + other.file_searches,
            self.containers + other.containers,
        )


NO_TOOLS = ToolCalls()
