"""All built-in tools of this server, and those of the requirements that it does not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from domain.custom_tool import DEFAULT_TOOL_NAMES
from domain.ports import Tool

# SOP §4.1.
_DESCRIPTIONS = {
    "web_search": "Search the web",
    "url_resolver": "Resolve and fetch URLs (adds https:// if it is missing)",
    "code_executor": "Execute Python code",
    "transcription": "Transcribe audio (AWS Transcribe)",
    "text_to_image": "Generate images (AWS Bedrock)",
    "text_to_video": "Generate video from text (AWS Bedrock)",
    "image_to_video": "Generate video from an image",
    "text_to_speech": "Generate speech from text",
    "combine_video_audio": "Combine video and audio into a video with sound",
    "svg_diagram": "Generate SVG diagrams of buildings and architecture",
    "ocr": "Extract text from images and PDFs",
    "summarization": "Summarize content",
    "question_answering": "Answer questions from given content",
    "translation": "Translate text (AWS Translate)",
    "read_file": "Read files from storage",
    "write_file": "Write files to storage",
}
ABSENT_SENTENCE = "This server has no adapter for it."


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A tool that agents may know by name. `missing` says what it lacks here, None when it can run."""

    name: str
    description: str
    tool: Tool | None
    missing: str | None


class ToolCatalogue:
    """The built-in tools, by name and in the order of the requirements."""

    def __init__(self, *tools: Tool) -> None:
        by_name = {tool.name: tool for tool in tools}
        if len(by_name) != len(tools):
            raise ValueError("two tools have the same name")
        names = [*DEFAULT_TOOL_NAMES, *(name for name in by_name if name not in DEFAULT_TOOL_NAMES)]
        self._tools = {name: by_name[name] for name in names if name in by_name}

    def get(self, name: str) -> Tool | None:
        """The tool, whether it can run or not; None when this server does not have it."""
        return self._tools.get(name)

    def all(self) -> Sequence[Tool]:
        """The tools that can run now."""
        return [tool for tool in self._tools.values() if tool.missing() is None]

    def entries(self) -> Sequence[CatalogueEntry]:
        """Every tool of the requirements, then the others, each with what it lacks."""
        names = [*DEFAULT_TOOL_NAMES, *(name for name in self._tools if name not in DEFAULT_TOOL_NAMES)]
        return [self._entry(name) for name in names]

    def _entry(self, name: str) -> CatalogueEntry:
        tool = self._tools.get(name)
        if tool is None:
            return CatalogueEntry(name, _DESCRIPTIONS[name], None, ABSENT_SENTENCE)
        return CatalogueEntry(name, _DESCRIPTIONS.get(name, tool.description), tool, tool.missing())
