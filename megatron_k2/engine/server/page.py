"""Where the chat page lies."""

from pathlib import Path

PAGE = Path(__file__).with_name("page.html")
